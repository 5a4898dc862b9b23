package serial

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"time"
)

// endpoint is the other end of a line, in memory.
type endpoint struct {
	mu    sync.Mutex
	out   bytes.Buffer
	input chan byte // closed: there is no more
}

func (e *endpoint) Write(p []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.out.Write(p)
}

func (e *endpoint) ReadInput(ctx context.Context, p []byte) (int, error) {
	select {
	case b, ok := <-e.input:
		if !ok {
			return 0, io.EOF
		}
		p[0] = b
		return 1, nil
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

func (e *endpoint) Close() error { return nil }

func readAll(t *testing.T, v *Viewer, n int) string {
	t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(v, b); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestSharedOutput(t *testing.T) {
	e := &endpoint{input: make(chan byte)}
	s := Share(e)
	long := strings.Repeat("0123456789abcdef", Scrollback/16)
	for _, p := range []string{"lost", long[:100], long[100:]} {
		if _, err := s.Write([]byte(p)); err != nil {
			t.Fatal(err)
		}
	}
	one, err := s.Attach(false)
	if err != nil {
		t.Fatal(err)
	}
	if got := readAll(t, one, Scrollback); got != long {
		t.Errorf("the scrollback begins with %q and ends with %q", got[:20], got[len(got)-20:])
	}
	two, err := s.Attach(true)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = s.Write([]byte("more"))
	if got := readAll(t, one, 4); got != "more" {
		t.Errorf("read %q", got)
	}
	if got := readAll(t, two, Scrollback); !strings.HasSuffix(got, "more") {
		t.Errorf("the second one reads %q at the end", got[len(got)-8:])
	}
	// One that does not read keeps nobody waiting, and finds the last of it.
	for range 3 {
		_, _ = s.Write([]byte(long))
	}
	if got := readAll(t, one, Scrollback); got != long {
		t.Error("what waited is not the last output")
	}
	if e.out.Len() != 4+len(long)*4+4 {
		t.Errorf("the other end got %d bytes", e.out.Len())
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := one.Read(make([]byte, 1)); errors.Is(err, io.EOF) {
			return
		}
	}
	t.Error("no end after Close")
}

func TestSharedInput(t *testing.T) {
	e := &endpoint{input: make(chan byte)}
	s := Share(e)
	w, err := s.Attach(true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Attach(true); !errors.Is(err, ErrHasWriter) {
		t.Errorf("a second writer: %v", err)
	}
	next := make(chan string)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		p := make([]byte, 8)
		for {
			n, err := s.ReadInput(ctx, p)
			if err != nil {
				ended <- err
				return
			}
			next <- string(p[:n])
		}
	}()
	e.input <- 'a'
	if got := <-next; got != "a" {
		t.Errorf("from the other end: %q", got)
	}
	go func() { _, _ = w.Write([]byte("typed")) }()
	if got := <-next; got != "typed" {
		t.Errorf("from the viewer: %q", got)
	}
	close(e.input) // a file brings no input, and a viewer still can
	time.Sleep(10 * time.Millisecond)
	go func() { _, _ = w.Write(bytes.Repeat([]byte("x"), 3*maxTyped)) }()
	total := 0
	for total < 3*maxTyped {
		total += len(<-next)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("late")); err == nil {
		t.Error("it writes after it was detached")
	}
	if again, err := s.Attach(true); err != nil {
		t.Errorf("another writer: %v", err)
	} else if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the end of input: %v", err)
	}
}
