package test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/vmm/memory"
)

// benchMiB is the size of the idle guest's filled memory, and of the raw copy.
const benchMiB = 2048

// rawRole makes the test binary one end of the raw copy, so that both ends are
// processes of their own, as they are in a migration.
const rawRole = "GOVMM_TEST_RAW_TCP"

// BenchmarkMigrateIdle migrates an idle guest whose memory holds 2 GiB that are
// not zero, and copies as much over raw TCP, turn by turn on loopback. The raw
// copy has what the migration has: source memory of the same backing that is
// populated, one connection, large writes, and a receiver whose memory is
// fresh, so that its page faults count on both sides of the ratio.
func BenchmarkMigrateIdle(b *testing.B) {
	needKVM(b)
	h := newHost(b)
	src := h.start("run", "m0", "--memory", fmt.Sprintf("%dM", benchMiB+128),
		"--cmdline", fmt.Sprintf("fill=%dM verify=0 tick=1", benchMiB))
	src.out.awaitText(b, 0, "filled ")
	raw := newRawSource(b)
	var rawRates, moveRates, downtimes []float64
	n := 0
	for b.Loop() {
		rawRates = append(rawRates, raw.copyOnce(b))
		_, addr := h.receive(fmt.Sprintf("m%d", n+1))
		r, exit := h.migrate(fmt.Sprintf("m%d", n), "--to", addr)
		if exit != 0 {
			b.Fatalf("%+v", r)
		}
		n++
		moveRates = append(moveRates, float64(r.PagesSent*pageSize)/(float64(r.TotalMS)/1000))
		downtimes = append(downtimes, r.DowntimeMS)
	}
	rate, base := median(moveRates), median(rawRates)
	b.ReportMetric(base/1e9, "raw-GB/s")
	b.ReportMetric(rate/1e9, "migration-GB/s")
	b.ReportMetric(rate/base, "of-raw-TCP")
	b.ReportMetric(median(downtimes), "downtime-ms")
	b.ReportMetric(0, "ns/op") // says nothing: it is both turns
}

func median(v []float64) float64 {
	v = slices.Clone(v)
	slices.Sort(v)
	return v[len(v)/2]
}

// rawSource is the process that sends raw memory, again and again.
type rawSource struct {
	in  io.Writer
	out *bufio.Reader
}

func rawProcess(b *testing.B, role string) (*exec.Cmd, io.WriteCloser, *bufio.Reader) {
	exe, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), rawRole+"="+role)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	return cmd, in, bufio.NewReader(out)
}

func newRawSource(b *testing.B) *rawSource {
	cmd, in, out := rawProcess(b, "send")
	b.Cleanup(func() {
		in.Close()
		_ = cmd.Wait() // it has done its work
	})
	if _, err := out.ReadString('\n'); err != nil { // populated
		b.Fatal(err)
	}
	return &rawSource{in, out}
}

// copyOnce sends all to a fresh receiver and returns bytes a second, from
// dialling to the receiver's word that it has all.
func (r *rawSource) copyOnce(b *testing.B) float64 {
	cmd, in, out := rawProcess(b, "receive")
	defer func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			b.Error(err)
		}
	}()
	addr, err := out.ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	if _, err := io.WriteString(r.in, addr); err != nil {
		b.Fatal(err)
	}
	line, err := r.out.ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	ns, err := strconv.ParseInt(strings.TrimSpace(line), 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	return benchMiB * mib / (float64(ns) / 1e9)
}

// rawChunk is what raw TCP is written and read by: of 256 KiB, 1, 4 and 16 MiB
// the one at which it was fastest.
const rawChunk = 1 << 20

// rawMain is the helper process.
func rawMain(role string) error {
	mem, err := memory.New(benchMiB*mib, memory.DefaultBacking)
	if err != nil {
		return err
	}
	defer mem.Close()
	if role == "receive" {
		return rawReceive(mem)
	}
	for slot, s := range mem.Slots() {
		all := mem.SlotBytes(slot, 0, s.Size/pageSize)
		for i := 0; i < len(all); i += 8 {
			all[i] = byte(i>>12) | 1
		}
	}
	fmt.Println("ready")
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		began := time.Now()
		if err := rawSend(mem, in.Text()); err != nil {
			return err
		}
		fmt.Println(time.Since(began).Nanoseconds())
	}
	return in.Err()
}

func rawSend(mem *memory.Memory, addr string) error {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	for slot, s := range mem.Slots() {
		all := mem.SlotBytes(slot, 0, s.Size/pageSize)
		for at := 0; at < len(all); at += rawChunk {
			if _, err := c.Write(all[at:min(at+rawChunk, len(all))]); err != nil {
				return err
			}
		}
	}
	_, err = io.ReadFull(c, make([]byte, 1))
	return err
}

func rawReceive(mem *memory.Memory) error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(ln.Addr())
	c, err := ln.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	for slot, s := range mem.Slots() {
		all := mem.SlotBytes(slot, 0, s.Size/pageSize)
		for at := 0; at < len(all); at += rawChunk {
			if _, err := io.ReadFull(c, all[at:min(at+rawChunk, len(all))]); err != nil {
				return err
			}
		}
	}
	_, err = c.Write([]byte{1})
	return err
}
