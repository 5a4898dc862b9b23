package migrate

import (
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// failing is memory of 64 pages at gpa 0x100000, of which a file behind it has the
// first.
type failing struct {
	Target
	span []byte
}

func newFailing(t *testing.T, good int) *failing {
	t.Helper()
	fd, err := unix.MemfdCreate("short", unix.MFD_CLOEXEC)
	check(t, err)
	defer unix.Close(fd)
	check(t, unix.Ftruncate(fd, int64(good*mempage.Size)))
	span, err := unix.Mmap(fd, 0, 64*mempage.Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	check(t, err)
	t.Cleanup(func() { check(t, unix.Munmap(span)) })
	return &failing{span: span}
}

func (f *failing) Slots() []Slot { return []Slot{{GPA: 0x100000, Pages: 64}} }
func (f *failing) Bytes(_ int, first, n uint64) []byte {
	return f.span[first*mempage.Size:][:n*mempage.Size]
}
func (f *failing) Populated(_ int, _, n uint64, bitmap []uint64) error {
	for i := range bitmap {
		bitmap[i] = ^uint64(0)
	}
	return nil
}
func (f *failing) Zero(_ int, first, n uint64) error {
	clear(f.Bytes(0, first, n))
	return nil
}

var check = testenv.Check

func namesPage(t *testing.T, what string, err error, gpa uint64) {
	t.Helper()
	if page := (*PageError)(nil); !errors.As(err, &page) || page.GPA != gpa {
		t.Errorf("%s: %v, want the page at gpa %#x", what, err, gpa)
	}
}

// TestPageThatFails: whatever reads or writes a page that the host cannot access names
// it, this process's own loads and stores and system calls.
func TestPageThatFails(t *testing.T) {
	ram := newFailing(t, 10)
	span := ram.Bytes(0, 4, 60)
	const gpa = 0x100000 + 10*mempage.Size
	r, w, err := os.Pipe()
	check(t, err)
	defer r.Close()
	defer w.Close()
	own := make([]byte, len(span))
	for what, f := range map[string]func() error{
		"load":  func() error { copy(own, span[6*mempage.Size:][:mempage.Size]); return nil },
		"store": func() error { copy(span[6*mempage.Size:][:mempage.Size], own); return nil },
		"write": func() error { _, err := unix.Write(int(w.Fd()), span[6*mempage.Size:]); return err },
		"writev": func() error {
			_, err := unix.Writev(int(w.Fd()), [][]byte{span[6*mempage.Size:]})
			return os.NewSyscallError("writev", err)
		},
	} {
		namesPage(t, what, guard(ram, 0, 4, span, f), gpa)
	}
	_, err = pageIsZero(ram, 0, 10)
	namesPage(t, "zero test", err, gpa)
	namesPage(t, "hashes", hashSpan(ram, 0, 0, 64, make([]byte, 64*hashSize)), gpa)
	_, _, err = populatedPages(t.Context(), ram)
	namesPage(t, "estimate", err, gpa)
	if err := guard(ram, 0, 0, span[:mempage.Size], func() error { return io.EOF }); err != io.EOF {
		t.Errorf("another error became %v", err)
	}
	if err := guard(ram, 0, 0, ram.Bytes(0, 0, 10), func() error { return unix.EFAULT }); err != unix.EFAULT {
		t.Errorf("EFAULT that has another reason became %v", err)
	}
}

// TestApplyToAPageThatFails: pages that land where the destination has no memory end
// the migration with the page's name, and not the process.
func TestApplyToAPageThatFails(t *testing.T) {
	const n, good = 64, 10
	content := slices.Repeat([]byte("content."), n*mempage.Size/8)
	for _, packed := range []bool{false, true} {
		ram := newFailing(t, good)
		here, there := net.Pipe()
		if !packed { // a socket, for readv
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
			check(t, err)
			for i, c := range []*net.Conn{&here, &there} {
				f := os.NewFile(uintptr(fds[i]), "socket")
				*c, err = net.FileConn(f)
				check(t, err)
				check(t, f.Close())
			}
		}
		defer here.Close()
		defer there.Close()
		meta := spanMeta{}
		meta.data[0] = ^uint64(0)
		head := slices.Clone(meta.encode(n))
		body, h := content, header{typ: framePages, count: n}
		if packed {
			p, err := newPacker(CompressLZ4)
			check(t, err)
			body, err = p.pack(content, meta.data[:1])
			check(t, err)
			h.typ, h.flags = framePacked, codecLZ4
		}
		h.length = uint32(len(head) + len(body))
		go func() {
			_, _ = here.Write(head)
			_, _ = here.Write(body)
		}()
		in := &inlet{conn: newConn(there), session: &session{slots: ram.Slots(), features: []string{featureLZ4}}}
		namesPage(t, h.typ.String(), in.apply(ram, h), 0x100000+good*mempage.Size)
	}
	// Zeros where there was something.
	ram := newFailing(t, good)
	in := &inlet{session: &session{slots: ram.Slots()}}
	in.meta.zero[0] = ^uint64(0)
	err := guard(ram, 0, 0, ram.span, func() error { return in.applyZero(ram, header{count: n}, ram.span) })
	namesPage(t, "zeros", err, 0x100000+good*mempage.Size)
}
