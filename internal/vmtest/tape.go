package vmtest

import (
	"bytes"
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
)

// Tape is the other end of a guest's serial port or console, a serial.Backend: it
// keeps what the guest writes, and the guest reads what the test types.
type Tape struct {
	typed chan byte

	outMu  sync.Mutex // guards out, closed
	moved  *sync.Cond
	out    bytes.Buffer
	closed bool
}

// NewTape returns an empty tape.
func NewTape() *Tape {
	c := &Tape{typed: make(chan byte, 64)}
	c.moved = sync.NewCond(&c.outMu)
	return c
}

// Write takes what the guest writes.
func (c *Tape) Write(p []byte) (int, error) {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	defer c.moved.Broadcast()
	return c.out.Write(p)
}

// ReadInput returns one byte of what the test has typed.
func (c *Tape) ReadInput(ctx context.Context, p []byte) (int, error) {
	select {
	case p[0] = <-c.typed:
		return 1, nil
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// Close implements serial.Backend.
func (c *Tape) Close() error {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	c.closed = true
	c.moved.Broadcast()
	return nil
}

// Closed reports whether Close has been called.
func (c *Tape) Closed() bool {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	return c.closed
}

// Text returns all that the guest has written.
func (c *Tape) Text() string {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	return c.out.String()
}

// Type types s. It waits while 64 bytes have not been read.
func (c *Tape) Type(s string) {
	for _, b := range []byte(s) {
		c.typed <- b
	}
}

// Unread returns how many bytes that were typed nobody has read.
func (c *Tape) Unread() int { return len(c.typed) }

// Await waits until the guest has written text and nothing else.
func (c *Tape) Await(t testing.TB, text string) {
	t.Helper()
	c.AwaitThat(t, text, func(out string) bool { return out == text })
}

// AwaitPart waits until the guest's output contains part.
func (c *Tape) AwaitPart(t testing.TB, part string) {
	t.Helper()
	c.AwaitThat(t, part, func(out string) bool { return strings.Contains(out, part) })
}

// AwaitThat waits until is accepts the guest's output; what names the condition in
// the message of a test that fails.
func (c *Tape) AwaitThat(t testing.TB, what string, is func(string) bool) {
	t.Helper()
	late := time.AfterFunc(testenv.Patience, func() { _ = c.Close() })
	defer late.Stop()
	c.outMu.Lock()
	defer c.outMu.Unlock()
	for !is(c.out.String()) {
		if c.closed {
			t.Fatalf("expected the guest to write %q, it wrote %q", what, c.out.String())
		}
		c.moved.Wait()
	}
}
