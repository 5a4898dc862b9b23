package serial

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/govmm/govmm/internal/charqueue"
	"github.com/govmm/govmm/virtio"
)

// defaultMax is how large a file of output becomes before it is rotated.
const defaultMax = 64 << 20

// file is the backend file:PATH. It appends, because both ends of a migration may
// write to one file, and to keep the output of earlier runs. A regular file that would
// exceed its size becomes PATH.1, in place of an older one. If PATH is not the open file
// any more, since another process has rotated or removed it, it is opened anew.
type file struct {
	path string
	most int64 // 0: no limit

	openMu sync.Mutex // guards f and closed; not held while f is written
	f      *os.File   // nil: the last attempt to open it failed
	closed bool
}

// parseFile reads the part of file:PATH[,max=SIZE] behind the colon.
func parseFile(words string) (*file, error) {
	b := &file{most: defaultMax}
	for i, item := range virtio.SplitOption(words) {
		key, value, _ := strings.Cut(item, "=")
		switch {
		case i == 0 && item != "":
			b.path = item
		case i > 0 && key == "max":
			var err error
			if b.most, err = parseSize(value); err != nil {
				return nil, fmt.Errorf("max=%.40q: %w", value, err)
			}
		default:
			return nil, fmt.Errorf("%.40q: expected PATH[,max=SIZE] (a comma in a path is written twice)", item)
		}
	}
	path, err := virtio.Absolute(b.path)
	b.path = path
	return b, err
}

// parseSize reads a number of bytes as in 64M; off is 0, no limit.
func parseSize(s string) (int64, error) {
	if s == "off" {
		return 0, nil
	}
	digits, shift := s, 0
	for i, unit := range []string{"K", "M", "G", "T"} {
		if number, ok := strings.CutSuffix(s, unit); ok {
			digits, shift = number, 10*(i+1)
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 || n > 1<<62>>shift || n<<shift < charqueue.MaxLine {
		return 0, fmt.Errorf("expected off, or a size of at least %d bytes, as in 64M", charqueue.MaxLine)
	}
	return n << shift, nil
}

func openFile(words string) (*file, error) {
	b, err := parseFile(words)
	if err == nil {
		err = b.open()
	}
	if err != nil {
		return nil, fmt.Errorf("serial port to a file: %w", err)
	}
	return b, nil
}

// open opens the file. openMu is held, or the backend is new.
func (b *file) open() error {
	f, err := os.OpenFile(b.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	b.f = f
	return nil
}

// Write appends to the file. It is called by one goroutine at a time.
func (b *file) Write(p []byte) (int, error) {
	f, err := b.room(int64(len(p)))
	if err != nil {
		return 0, err
	}
	return f.Write(p)
}

// room returns the file with room for n bytes.
func (b *file) room(n int64) (*os.File, error) {
	b.openMu.Lock()
	defer b.openMu.Unlock()
	for range 3 { // a process that rotates the same file may come between
		if b.closed {
			return nil, os.ErrClosed
		}
		if b.f == nil {
			if err := b.open(); err != nil {
				return nil, err
			}
		}
		st, err := b.f.Stat()
		if err != nil {
			return nil, err
		}
		if !st.Mode().IsRegular() {
			return b.f, nil
		}
		named, err := os.Stat(b.path)
		switch {
		case errors.Is(err, os.ErrNotExist), err == nil && !os.SameFile(st, named):
			_ = b.f.Close() // somebody else has what was written to it
			b.f = nil
		case err != nil:
			return nil, err
		case b.most == 0 || st.Size() == 0 || st.Size()+n <= b.most:
			return b.f, nil
		default:
			if err := b.rotate(st); err != nil {
				return nil, fmt.Errorf("rotate it at %d bytes: %w", b.most, err)
			}
		}
	}
	return b.f, nil
}

// rotate renames the file, which is opened anew then. openMu is held.
func (b *file) rotate(open os.FileInfo) error {
	// With the lock, two processes do not rotate one file twice.
	if errors.Is(unix.Flock(int(b.f.Fd()), unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK) {
		return nil // another one is just doing it
	}
	if named, err := os.Stat(b.path); err == nil && os.SameFile(open, named) {
		if err := os.Rename(b.path, b.path+".1"); err != nil {
			return err
		}
	}
	_ = b.f.Close()
	b.f = nil
	return nil
}

// ReadInput returns io.EOF.
func (b *file) ReadInput(context.Context, []byte) (int, error) { return 0, io.EOF }

// Close closes the file.
func (b *file) Close() error {
	b.openMu.Lock()
	defer b.openMu.Unlock()
	if b.closed || b.f == nil {
		b.closed = true
		return nil
	}
	b.closed = true
	return b.f.Close()
}
