package test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/hosttls"
	"github.com/govmm/govmm/vmm/memory"
)

// Environment of a helper process: this test binary with a role. Helpers are both
// ends of a raw copy over TCP, and both ends of the migration engine with memory that
// no guest runs in. As in a migration, each end is a process.
const (
	rawRole = "GOVMM_TEST_RAW_TCP"     // send, receive, migrate, arrive
	rawMiB  = "GOVMM_TEST_RAW_MIB"     // of memory
	rawFill = "GOVMM_TEST_RAW_FILL"    // MiB of it that the sender fills
	rawConn = "GOVMM_TEST_RAW_STREAMS" // connections that the receiver waits for
	rawTLS  = "GOVMM_TEST_RAW_TLS"     // directory of the certificates; "": plain
)

// rawChunk is the size of a write and of a read of raw TCP. Of 256 KiB, 1, 4 and
// 16 MiB it was the fastest.
const rawChunk = 1 << 20

// helper is a process with a role.
type helper struct {
	b   *testing.B
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startHelper(b *testing.B, role string, env ...string) *helper {
	b.Helper()
	return startHelperIn(b, "", role, env...)
}

// startHelperIn is startHelper in a network namespace; "": in this one.
func startHelperIn(b *testing.B, netns, role string, env ...string) *helper {
	b.Helper()
	exe, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	h := &helper{b: b, cmd: exec.Command(exe)}
	if netns != "" {
		h.cmd = exec.Command("ip", "netns", "exec", netns, exe)
	}
	h.cmd.Env = append(append(os.Environ(), rawRole+"="+role), env...)
	h.cmd.Stderr = os.Stderr
	if h.in, err = h.cmd.StdinPipe(); err != nil {
		b.Fatal(err)
	}
	out, err := h.cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	h.out = bufio.NewReader(out)
	if err := h.cmd.Start(); err != nil {
		b.Fatal(err)
	}
	return h
}

func (h *helper) end() {
	h.in.Close()
	if err := h.cmd.Wait(); err != nil {
		h.b.Error(err)
	}
}

// ask writes a line, if there is one, and returns the next.
func (h *helper) ask(line string) string {
	h.b.Helper()
	if line != "" {
		if _, err := io.WriteString(h.in, line+"\n"); err != nil {
			h.b.Fatal(err)
		}
	}
	answer, err := h.out.ReadString('\n')
	if err != nil {
		h.b.Fatal(err)
	}
	return strings.TrimSpace(answer)
}

// sender is a helper that sends the same memory again and again.
type sender struct {
	*helper
	mib, fill int
	receiver  string // role of the other end
	tls       string // directory of the certificates of both; "": plain
	netns     string // where the receiver is, and
	host      string // its address there
}

// newSender starts one with so much memory, of which fill is not zero.
func newSender(b *testing.B, role, receiver string, mib, fill int) *sender {
	return newSenderOver(b, "", role, receiver, mib, fill)
}

// newSenderOver is newSender over TLS, with the certificates of a directory.
func newSenderOver(b *testing.B, tls, role, receiver string, mib, fill int) *sender {
	s := &sender{helper: startHelper(b, role, fmt.Sprintf("%s=%d", rawMiB, mib), fmt.Sprintf("%s=%d", rawFill, fill), rawTLS+"="+tls),
		mib: mib, fill: fill, receiver: receiver, tls: tls}
	b.Cleanup(s.end)
	s.ask("") // populated
	return s
}

// send sends all memory to a new receiver by n connections and returns the time from
// dialling until the receiver says that it has all.
func (s *sender) send(n int, more ...string) time.Duration {
	s.b.Helper()
	r := startHelperIn(s.b, s.netns, s.receiver, fmt.Sprintf("%s=%d", rawMiB, s.mib), fmt.Sprintf("%s=%d", rawConn, n), rawHost+"="+s.host, rawTLS+"="+s.tls)
	defer r.end()
	line := fmt.Sprintf("%s %d %s", r.ask(""), n, strings.Join(more, " "))
	ns, err := strconv.ParseInt(s.ask(line), 10, 64)
	if err != nil {
		s.b.Fatal(err)
	}
	return time.Duration(ns)
}

func envInt(name string) uint64 {
	n, _ := strconv.ParseUint(os.Getenv(name), 10, 32) // the benchmark has set it
	return n
}

// rawMain is the helper process.
func rawMain(role string) error {
	if role == "arrive" {
		return engineReceive()
	}
	mem, err := memory.New(envInt(rawMiB)*mib, memory.DefaultBacking)
	if err != nil {
		return err
	}
	defer mem.Close()
	if role == "receive" {
		return rawReceive(mem, int(envInt(rawConn)))
	}
	if err := fillFrom(mem, envInt(rawFill)*mib); err != nil {
		return err
	}
	fmt.Println("ready")
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var addr, compress string
		var n int
		_, _ = fmt.Sscan(in.Text(), &addr, &n, &compress) // compress may be missing
		began := time.Now()
		switch {
		case role == "send":
			err = rawSend(mem, addr, n)
		case compress == predict:
			began, err = engineEstimate(mem, addr, n)
		default:
			err = engineSend(mem, addr, n, migrate.Compression(compress))
		}
		took := time.Since(began)
		if err != nil {
			return err
		}
		fmt.Println(took.Nanoseconds())
	}
	return in.Err()
}

// fillFrom fills the first n bytes of memory with copies of this program: content
// that compresses as a guest's memory does.
func fillFrom(mem *memory.Memory, n uint64) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	program, err := os.ReadFile(exe)
	if err != nil {
		return err
	}
	for slot, s := range mem.Slots() {
		all := mem.SlotBytes(slot, 0, s.Size/mempage.Size)
		for at := 0; at < len(all) && n > 0; {
			c := copy(all[at:], program[:min(n, uint64(len(program)))])
			at, n = at+c, n-uint64(c)
		}
	}
	return nil
}

// eachChunk calls f for the chunks of memory that the stream i of n carries:
// every nth run of 4 MiB.
func eachChunk(mem *memory.Memory, i, n int, f func([]byte) error) error {
	const run = 4 << 20
	for slot, s := range mem.Slots() {
		all := mem.SlotBytes(slot, 0, s.Size/mempage.Size)
		for at := 0; at < len(all); at += rawChunk {
			if at/run%n != i {
				continue
			}
			if err := f(all[at:min(at+rawChunk, len(all))]); err != nil {
				return err
			}
		}
	}
	return nil
}

// each runs f for n streams at once.
func each(n int, f func(i int) error) error {
	errs := make([]error, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { errs[i] = f(i) })
	}
	all.Wait()
	return errors.Join(errs...)
}

func rawSend(mem *memory.Memory, addr string, n int) error {
	return each(n, func(i int) error {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write([]byte{byte(i)}); err != nil {
			return err
		}
		if err := eachChunk(mem, i, n, func(b []byte) error {
			_, err := c.Write(b)
			return err
		}); err != nil {
			return err
		}
		_, err = io.ReadFull(c, make([]byte, 1))
		return err
	})
}

func rawReceive(mem *memory.Memory, n int) error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(ln.Addr())
	return each(n, func(int) error {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		defer c.Close()
		var i [1]byte
		if _, err := io.ReadFull(c, i[:]); err != nil {
			return err
		}
		if err := eachChunk(mem, int(i[0]), n, func(b []byte) error {
			_, err := io.ReadFull(c, b)
			return err
		}); err != nil {
			return err
		}
		_, err = c.Write([]byte{1})
		return err
	})
}

// still is memory as a machine in which nothing runs. It shows what the engine alone
// can do, without KVM, a guest or a VMM.
type still struct{ *memory.Memory }

func (s still) Slots() []migrate.Slot {
	var out []migrate.Slot
	for _, m := range s.Memory.Slots() {
		out = append(out, migrate.Slot{GPA: m.GPA, Pages: m.Size / mempage.Size})
	}
	return out
}

func (s still) Bytes(slot int, first, n uint64) []byte { return s.SlotBytes(slot, first, n) }
func (s still) StartDirtyLog() error                   { return nil }
func (s still) StopDirtyLog() error                    { return nil }
func (s still) FetchDirtyLog(_ int, bitmap []uint64) error {
	clear(bitmap)
	return nil
}
func (s still) ClearDirtyLog(int, uint64, uint64, []uint64) error    { return nil }
func (s still) ManualProtect() bool                                  { return true }
func (s still) FetchVMMDirty(slot int, each func(int, uint64)) error { return s.FetchDirty(slot, each) }
func (s still) MigrationConfig() ([]byte, error) {
	return binary.LittleEndian.AppendUint64(nil, s.Size()), nil
}
func (s still) Paused() bool                                  { return false }
func (s still) PrepareStop(context.Context) error             { return nil }
func (s still) PauseForHandoff(context.Context) (bool, error) { return true, nil }
func (s still) YieldForHandoff(context.Context) error         { return nil }
func (s still) ResumeAfterAbort(context.Context) error        { return nil }
func (s still) SaveState(context.Context) ([]byte, error)     { return make([]byte, 16<<10), nil }
func (s still) PrepareState([]byte) error                     { return nil }
func (s still) LoadState(context.Context, []byte) error       { return nil }
func (s still) UnloadState(context.Context) error             { return nil }
func (s still) Start(context.Context, bool) error             { return nil }
func (s still) Discard() error                                { return s.Close() }

type stillBuilder struct{}

func (stillBuilder) Build(_ context.Context, config []byte) (migrate.Target, error) {
	mem, err := memory.New(binary.LittleEndian.Uint64(config), memory.DefaultBacking)
	if err != nil {
		return nil, err
	}
	return still{mem}, nil
}

func engineSend(mem *memory.Memory, addr string, channels int, c migrate.Compression) error {
	opt := migrate.Options{Channels: channels, Compression: c}
	if dir := os.Getenv(rawTLS); dir != "" {
		credentials, err := hosttls.ReadDir(dir)
		if err != nil {
			return err
		}
		if opt.TLS, err = credentials.Client(rawName); err != nil {
			return err
		}
	}
	_, err := migrate.New(still{mem}, addr, opt).Run(context.Background())
	return err
}

// predict, in the place of a compression, asks for an estimate.
const predict = "predict"

// engineEstimate returns the time at which a migration that ends now would have
// begun, if it took as long as the estimate predicts.
func engineEstimate(mem *memory.Memory, addr string, channels int) (began time.Time, err error) {
	e, err := migrate.EstimateMigration(context.Background(), still{mem}, addr, migrate.Options{Channels: channels}, 100*time.Millisecond)
	return time.Now().Add(-e.Total), err
}

func engineReceive() error {
	host := "127.0.0.1"
	if h := os.Getenv(rawHost); h != "" {
		host = h
	}
	ln, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return err
	}
	r := migrate.NewReceiver(stillBuilder{}, nil)
	if dir := os.Getenv(rawTLS); dir != "" {
		server, err := hosttls.NewServer(dir, nil, slog.New(slog.DiscardHandler))
		if err != nil {
			return err
		}
		if err := r.RequireTLS(server.Config()); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- r.Serve(ctx, ln) }()
	fmt.Println(ln.Addr())
	_, _ = io.Copy(io.Discard, os.Stdin) // until its parent ends it
	cancel()
	return <-served
}

// rawName is the name in the certificates of [rawTLS].
const rawName = "engine"

// rawHost is the address that the engine's destination listens on.
const rawHost = "GOVMM_TEST_RAW_HOST"
