package find

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/govmm/govmm/vmm/diskboot/wire"
	"github.com/govmm/govmm/vmm/sandbox"
	"golang.org/x/sys/unix"
)

const (
	// conn is the socket that the reader is started with: exec.Cmd's ExtraFiles begin at 3.
	conn = 3
	// softMemory is from when on memory is collected eagerly, and hardMemory, in bytes of
	// private memory, ends the process. (RLIMIT_AS would count what Go only reserves.)
	softMemory = 96 << 20
	hardMemory = 256 << 20
	// patience is after how long this process ends itself; its starter gives up before.
	patience = 40 * time.Second
	nobody   = 65534
)

// Serve is what the process of diskboot.Start does: it goes into its cage, and answers
// questions until its socket is closed.
func Serve() error {
	if err := Enter(); err != nil {
		return err
	}
	c := os.NewFile(conn, "the VM's process")
	buffer := make([]byte, 4096)
	for {
		kind, p, err := wire.Next(c, buffer[:cap(buffer)])
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		var q wire.Question
		if kind != wire.Request {
			return fmt.Errorf("a frame %q, expected a question", kind)
		}
		if err := json.Unmarshal(p, &q); err != nil {
			return err
		}
		late := time.AfterFunc(patience, func() { os.Exit(4) })
		if err := answer(c, q); err != nil {
			return err
		}
		late.Stop()
		debug.FreeOSMemory() // it waits now, perhaps for ever
	}
}

// Enter gives up everything but the socket, as [Serve] does first.
func Enter() error {
	debug.SetMemoryLimit(softMemory)
	if !raced {
		if err := unix.Setrlimit(unix.RLIMIT_DATA, &unix.Rlimit{Cur: hardMemory, Max: hardMemory}); err != nil {
			return fmt.Errorf("RLIMIT_DATA: %w", err)
		}
	}
	if err := closeOthers(); err != nil {
		return err
	}
	if os.Geteuid() == 0 {
		for _, err := range []error{syscall.Setgroups(nil), syscall.Setresgid(nobody, nobody, nobody), syscall.Setresuid(nobody, nobody, nobody)} {
			if err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EINVAL) { // in a user namespace
				return fmt.Errorf("become nobody: %w", err)
			}
		}
	}
	_, err := sandbox.EnterBare()
	return err
}

// closeOthers closes what was inherited beside the socket: what the VM's process was
// started with by a shell, for example.
func closeOthers() error {
	const dir = "/proc/self/fd"
	list, err := os.ReadDir(dir)
	if err != nil {
		return nil // no /proc: nothing can be said
	}
	for _, e := range list {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd <= conn {
			continue
		}
		// Go's runtime has some of its own.
		to, err := os.Readlink(dir + "/" + e.Name())
		if err != nil || strings.HasPrefix(to, "anon_inode:") || strings.HasPrefix(to, "/sys/fs/cgroup/") || strings.HasPrefix(to, "/proc/") {
			continue
		}
		if err := unix.Close(fd); err != nil {
			return fmt.Errorf("close %s: %w", to, err)
		}
	}
	return nil
}

// remote is the disk, which the VM's process reads.
type remote struct {
	c      *os.File
	buffer []byte
}

// ReadAt implements [io.ReaderAt].
func (r *remote) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		m := min(len(p)-n, wire.MaxFrame)
		var b [12]byte
		binary.LittleEndian.PutUint64(b[:], uint64(off)+uint64(n))
		binary.LittleEndian.PutUint32(b[8:], uint32(m))
		if err := wire.Write(r.c, wire.Read, b[:]); err != nil {
			return n, err
		}
		kind, got, err := wire.Next(r.c, r.buffer)
		switch {
		case err != nil:
			os.Exit(5) // nobody waits for an answer
		case kind == wire.Fault:
			return n, fmt.Errorf("%.200s", got)
		case kind != wire.Data || len(got) != m:
			os.Exit(5)
		}
		n += copy(p[n:], got)
	}
	return n, nil
}

// answer looks for what is asked for. Its error is that of the socket. A file that cannot be
// read although its size is told already is another answer.
func answer(c *os.File, q wire.Question) error {
	reply, image := lookFor(&remote{c, make([]byte, wire.MaxFrame)}, q)
	b, err := json.Marshal(reply)
	if err == nil && len(b) > wire.MaxFrame {
		b, err = json.Marshal(wire.Reply{Error: "its boot loader's configuration is too long"})
		image = nil
	}
	if err != nil {
		return err
	}
	if err := wire.Write(c, wire.Answer, b); err != nil || image == nil {
		return err
	}
	for _, s := range []*Stream{&image.Kernel, &image.Initrd} {
		var lost *lostError
		if _, err := s.WriteTo(frames{c}); errors.As(err, &lost) {
			return err
		} else if err != nil {
			b, err := json.Marshal(wire.Reply{Error: err.Error()})
			if err == nil {
				err = wire.Write(c, wire.Answer, b)
			}
			return err
		}
	}
	return nil
}

// frames sends what is written to it.
type frames struct{ c *os.File }

// lostError is an error of the socket.
type lostError struct{ error }

func (f frames) Write(p []byte) (n int, err error) {
	for n < len(p) {
		m := min(len(p)-n, wire.MaxFrame)
		if err := wire.Write(f.c, wire.Bytes, p[n:n+m]); err != nil {
			return n, &lostError{err}
		}
		n += m
	}
	return n, nil
}

// lookFor is the answer to a question, and the files that follow it; nil: none.
func lookFor(d io.ReaderAt, q wire.Question) (*wire.Reply, *Image) {
	var entries []*Entry
	err := guarded(func() (err error) {
		entries, err = Disk(d, q.Size)
		return err
	})
	if err != nil {
		var none *noKernel
		return &wire.Reply{Error: err.Error(), NoKernel: errors.As(err, &none)}, nil
	}
	reply := new(wire.Reply)
	if q.List {
		for _, e := range entries {
			w := e.wire()
			w.Cmdline = withConsole(w.Cmdline)
			reply.Entries = append(reply.Entries, w)
		}
		return reply, nil
	}
	e, err := Choose(entries, q.Entry)
	var image *Image
	if err == nil {
		err = guarded(func() (err error) {
			image, err = e.Image()
			return err
		})
	}
	if err != nil {
		return &wire.Reply{Error: err.Error()}, nil
	}
	w := e.wire()
	w.Cmdline = image.Cmdline
	return &wire.Reply{Entries: []wire.Entry{w}, Kernel: image.Kernel.Size, Initrd: image.Initrd.Size}, image
}

func (e *Entry) wire() wire.Entry {
	return wire.Entry{ID: e.ID, Title: e.Title, Source: e.Source, Kernel: e.Kernel(), Initrds: e.Initrds(), Cmdline: e.Cmdline}
}
