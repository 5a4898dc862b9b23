package blk

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestInherit: a disk goes on from the descriptors of another process, here of the same one.
// At no moment can anybody else lock it, and the first holder can go on after all.
func TestInherit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.img")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	open := func() *backend {
		b, err := (&Spec{Config: Config{Path: path}}).Open(slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return b.(*backend)
	}
	files := func(b *backend) (out []*os.File) {
		fds, err := b.Descriptors()
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			n, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, os.NewFile(uintptr(n), path))
		}
		return out
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	stranger := open()
	defer stranger.Close()
	locked := func() {
		t.Helper()
		if err := stranger.Lock(); err == nil {
			t.Fatal("another one could lock it")
		}
	}
	first := open()
	check(first.Lock())
	locked()
	spec := *first.spec
	// One that fails: it locks, unlocks and closes, and the first one takes it back.
	b, err := spec.Inherit(files(first), slog.New(slog.DiscardHandler))
	check(err)
	second := b.(*backend)
	check(second.Lock())
	locked()
	check(second.Unlock(t.Context()))
	check(second.Close())
	check(first.Lock())
	locked()
	// One that takes it.
	b, err = spec.Inherit(files(first), slog.New(slog.DiscardHandler))
	check(err)
	second = b.(*backend)
	locked()
	check(second.Lock())
	check(first.Close())
	locked()
	check(second.Unlock(t.Context()))
	check(stranger.Lock())
	check(second.Close())
	// What is no such disk.
	readOnly, err := os.Open(path)
	check(err)
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	check(err)
	small := spec
	small.Size = 512
	for want, try := range map[string]func() error{
		"another way":  func() error { _, err := spec.Inherit([]*os.File{readOnly}, nil); return err },
		"neither":      func() error { _, err := spec.Inherit([]*os.File{null}, nil); return err },
		"descriptor":   func() error { _, err := spec.Inherit(nil, nil); return err },
		"expected 512": func() error { _, err := small.Inherit(files(stranger), nil); return err },
	} {
		if err := try(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("expected an error with %q, found %v", want, err)
		}
	}
}
