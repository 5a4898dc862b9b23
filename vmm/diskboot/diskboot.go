// Package diskboot reads the kernel of the system on a virtual disk. The disk's bytes are
// the guest's, so they are looked at by a process of their own, the reader (package find),
// which has no files, no network, few system calls, and bounded memory and time. It asks
// this process for the bytes of the disk, and answers with a kernel, an initial RAM disk and
// a command line, whose sizes are checked here.
//
// The reader is started before its starter gives up the right to start programs, and waits:
// a guest that resets itself boots what is on its disk by then.
package diskboot

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"

	_ "github.com/govmm/govmm/internal/supported" // Linux on x86-64 only
	"github.com/govmm/govmm/vmm/diskboot/wire"
	"golang.org/x/sys/unix"
)

// Bounds of what is accepted from the reader.
const (
	MaxKernel  = 128 << 20 // bytes
	MaxInitrd  = 256 << 20 // bytes
	MaxCmdline = 2047      // bytes
	// Timeout bounds one search, and so how long a guest's reset may take for it.
	Timeout = 30 * time.Second

	maxRead    = 8 << 30 // bytes of the disk for one search
	maxEntries = 512
	maxText    = 1024
)

// Disk is what a kernel is read from.
type Disk interface {
	io.ReaderAt
	// Size is the disk's size in bytes.
	Size() int64
}

// Entry is a way to boot that a disk has. Its texts are the guest's, made printable.
type Entry = wire.Entry

// Image is what an entry boots.
type Image struct {
	Entry  Entry
	Kernel []byte
	Initrd []byte // empty: none
}

// Reader is a process that reads disks.
type Reader struct {
	requestMu sync.Mutex // held for a request: one at a time
	conn      *os.File
	cmd       *exec.Cmd
	ended     chan struct{} // closed when the process has ended
	wait      error         // of the process; read when ended is closed
}

// marked is in the environment of the process that Start starts. A program that is started as
// a reader and does not call find.Serve would otherwise start itself again and again.
const marked = "GOVMM_READS_DISK"

// Start starts the process that command names, which calls find.Serve.
func Start(command []string) (*Reader, error) {
	if os.Getenv(marked) != "" {
		return nil, errors.New("this process was started to read disks, and starts no other for that: its main function must call find.Serve")
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.SetNonblock(fds[0], true) // so that it has deadlines
	}
	if err != nil {
		return nil, fmt.Errorf("a socket for the process that reads disks: %w", err)
	}
	r := &Reader{conn: os.NewFile(uintptr(fds[0]), "disk reader"), ended: make(chan struct{})}
	theirs := os.NewFile(uintptr(fds[1]), "disk reader")
	defer theirs.Close()
	r.cmd = exec.Command(command[0], command[1:]...)
	r.cmd.Dir = "/"
	r.cmd.Env = []string{"GOMAXPROCS=1", "GOGC=50", "GODEBUG=madvdontneed=1", "GOTRACEBACK=none", marked + "=1"}
	r.cmd.ExtraFiles = []*os.File{theirs}
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no key of a terminal reaches it
	if err := r.cmd.Start(); err != nil {
		_ = r.conn.Close()
		return nil, fmt.Errorf("start the process that reads disks: %w", err)
	}
	go func() {
		r.wait = r.cmd.Wait()
		close(r.ended)
	}()
	return r, nil
}

// Close ends the process.
func (r *Reader) Close() error { return r.conn.Close() }

// Read returns what the disk boots: its entry with this id or title, or the one that its
// boot loader would choose.
func (r *Reader) Read(ctx context.Context, d Disk, entry string) (*Image, error) {
	var i Image
	err := r.request(ctx, d, wire.Question{Entry: entry}, func(t *talk) (err error) {
		if len(t.reply.Entries) != 1 {
			return fmt.Errorf("the reader answered with %d entries, expected 1", len(t.reply.Entries))
		}
		i.Entry = t.reply.Entries[0]
		if err := checkCmdline(i.Entry.Cmdline); err != nil {
			return err
		}
		if i.Kernel, err = t.bytes("kernel", t.reply.Kernel, MaxKernel); err == nil {
			i.Initrd, err = t.bytes("initial RAM disk", t.reply.Initrd, MaxInitrd)
		}
		if err == nil && len(i.Kernel) == 0 {
			err = errors.New("the reader answered without a kernel")
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	i.Entry = printable(i.Entry)
	return &i, nil
}

// List returns the ways to boot that a disk has, the one that boots first.
func (r *Reader) List(ctx context.Context, d Disk) (entries []Entry, err error) {
	err = r.request(ctx, d, wire.Question{List: true}, func(t *talk) error {
		for _, e := range t.reply.Entries[:min(len(t.reply.Entries), maxEntries)] {
			entries = append(entries, printable(e))
		}
		return nil
	})
	return entries, err
}

// ErrNoKernel is matched by the error for a disk on which nothing was found that boots.
var ErrNoKernel = errors.New("no kernel")

// found is what the reader says about the disk, and not a fault of the reader.
type found struct {
	text     string
	noKernel bool
}

func (f *found) Error() string        { return f.text }
func (f *found) Is(target error) bool { return f.noKernel && target == ErrNoKernel }

// request asks the reader, and ends it if it does not answer as it should.
func (r *Reader) request(ctx context.Context, d Disk, q wire.Question, take func(*talk) error) error {
	r.requestMu.Lock()
	defer r.requestMu.Unlock()
	if err := r.conn.SetDeadline(time.Now().Add(Timeout)); err != nil {
		return fmt.Errorf("the process that reads disks has ended: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = r.conn.SetDeadline(time.Now()) })
	defer stop()
	q.Size = d.Size()
	t := &talk{conn: r.conn, disk: d, size: q.Size, left: maxRead, in: make([]byte, wire.MaxFrame), out: make([]byte, wire.MaxFrame)}
	err := t.ask(q)
	if err == nil {
		err = take(t)
	}
	if err == nil {
		return nil
	}
	if about := (*found)(nil); errors.As(err, &about) {
		return err
	}
	// It may be anywhere in its answer, and is asked no more.
	_ = r.conn.Close()
	defer r.kill()
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("it took more than %v", Timeout)
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, os.ErrClosed):
		select {
		case <-r.ended:
			return fmt.Errorf("the process that reads it has ended (%v): what is on it is damaged, or needs more memory than a system does", r.wait)
		case <-time.After(time.Second):
		}
	}
	return fmt.Errorf("the process that reads it: %w", err)
}

// kill ends the process, by a descriptor of it only: a sandbox lets nothing else through.
// Without one the process ends itself when its socket is closed, or it has worked for long.
func (r *Reader) kill() {
	_ = r.cmd.Process.WithHandle(func(fd uintptr) { _ = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
}

// talk is one question and its answer.
type talk struct {
	conn    *os.File
	disk    Disk
	size    int64
	left    int64 // bytes that the reader may still ask for
	in, out []byte
	reply   wire.Reply
}

// ask sends a question and waits for the answer.
func (t *talk) ask(q wire.Question) error {
	b, err := json.Marshal(q)
	if err == nil {
		err = wire.Write(t.conn, wire.Request, b)
	}
	if err != nil {
		return err
	}
	kind, p, err := t.next()
	if err != nil {
		return err
	}
	if kind != wire.Answer {
		return fmt.Errorf("a frame %q of %d bytes", kind, len(p))
	}
	return t.answer(p)
}

// answer decodes an answer, and returns the error that it may be.
func (t *talk) answer(p []byte) error {
	if err := json.Unmarshal(p, &t.reply); err != nil {
		return err
	}
	if t.reply.Error != "" {
		return &found{text(t.reply.Error, 8*maxText), t.reply.NoKernel}
	}
	return nil
}

// next gives the reader the bytes of the disk that it asks for, and returns the next frame
// that is something else. It is valid until the next call.
func (t *talk) next() (kind byte, p []byte, err error) {
	for {
		kind, p, err := wire.Next(t.conn, t.in)
		if err != nil || kind != wire.Read {
			return kind, p, err
		}
		if len(p) != 12 {
			return 0, nil, fmt.Errorf("a frame %q of %d bytes", kind, len(p))
		}
		off, n := int64(binary.LittleEndian.Uint64(p)), int64(binary.LittleEndian.Uint32(p[8:]))
		if off < 0 || n > wire.MaxFrame || off > t.size || n > t.size-off {
			return 0, nil, fmt.Errorf("it asks for %d bytes at %d of a disk of %d", n, off, t.size)
		}
		if t.left -= n; t.left < 0 {
			return 0, nil, fmt.Errorf("it asks for more than %d GiB", maxRead>>30)
		}
		answer, data := byte(wire.Data), t.out[:n]
		if m, err := t.disk.ReadAt(data, off); int64(m) < n {
			if err == nil {
				err = io.ErrUnexpectedEOF
			}
			answer, data = wire.Fault, []byte(text(err.Error(), maxText))
		}
		if err := wire.Write(t.conn, answer, data); err != nil {
			return 0, nil, err
		}
	}
}

// bytes takes what follows an answer.
func (t *talk) bytes(what string, size, most int64) ([]byte, error) {
	if size < 0 || size > most {
		return nil, fmt.Errorf("a size of the %s of %d bytes: must be at most %d", what, size, most)
	}
	b := make([]byte, size)
	for n := 0; n < len(b); {
		kind, p, err := t.next()
		switch {
		case err != nil:
			return nil, err
		case kind == wire.Answer: // after all it could not be read
			if err := t.answer(p); err != nil {
				return nil, err
			}
			return nil, fmt.Errorf("an answer within the %s", what)
		case kind != wire.Bytes || len(p) == 0 || len(p) > len(b)-n:
			return nil, fmt.Errorf("a frame %q of %d bytes within the %s", kind, len(p), what)
		}
		n += copy(b[n:], p)
	}
	return b, nil
}

func checkCmdline(s string) error {
	if len(s) > MaxCmdline {
		return fmt.Errorf("a command line of %d bytes: must be at most %d", len(s), MaxCmdline)
	}
	for _, r := range s {
		if r == unicode.ReplacementChar || unicode.IsControl(r) {
			return errors.New("a command line that is no line of text")
		}
	}
	return nil
}

func printable(e Entry) Entry {
	e.ID, e.Title, e.Source, e.Kernel = text(e.ID, maxText), text(e.Title, maxText), text(e.Source, maxText), text(e.Kernel, maxText)
	e.Cmdline = text(e.Cmdline, 2*MaxCmdline)
	for i := range e.Initrds {
		e.Initrds[i] = text(e.Initrds[i], maxText)
	}
	return e
}

// text makes what the guest wrote harmless for a terminal.
func text(s string, most int) string {
	if len(s) > most {
		s = s[:most] + "…"
	}
	return strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsGraphic(r) {
			return '?'
		}
		return r
	}, s)
}

// Looks says whether a disk may have a system, by the marks that partition tables and file
// systems have at fixed places: whether it is worth to look further. A disk with
// nothing on it, or whose content a program keeps in a way of its own, has none of them.
func Looks(r io.ReaderAt) bool {
	for _, m := range []struct {
		off   int64
		marks []string
	}{
		{0, []string{"hsqs", "XFSB"}}, {510, []string{"\x55\xaa"}}, {1024 + 0x38, []string{"\x53\xef"}}, {512, []string{"EFI PART"}}, {4096, []string{"EFI PART"}},
		{0x8001, []string{"CD001"}}, {0x10040, []string{"_BHRfS_M"}},
	} {
		for _, mark := range m.marks {
			b := make([]byte, len(mark))
			if n, _ := r.ReadAt(b, m.off); n == len(b) && string(b) == mark {
				return true
			}
		}
	}
	return false
}
