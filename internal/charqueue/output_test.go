package charqueue

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// writes remembers each Write.
type writes struct {
	mu  sync.Mutex // guards got
	got []string
}

func (w *writes) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.got = append(w.got, string(p))
	return len(p), nil
}

func (w *writes) want(t *testing.T, when string, want ...string) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if !slices.Equal(w.got, want) {
		t.Errorf("%s: expected the writes %q, found %q", when, want, w.got)
	}
	w.got = nil
}

// A byte that comes to an idle line, a key's echo for example, is written before any
// time passes. What follows at once, the rest of a prompt for example, is written
// with one Write, without its end of line, after the time in which it gathers.
func TestIdleLineIsWrittenAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w writes
		o := NewOutput(&w, 1, func() {})
		say := func(s string) {
			for i := range len(s) {
				o.Put([]byte{s[i]})
			}
		}
		for _, key := range []string{"a", "b", "c"} {
			o.Put([]byte(key))
			synctest.Wait()
			w.want(t, "a key's echo", key)
			time.Sleep(50 * time.Millisecond)
		}
		o.Put([]byte("l"))
		synctest.Wait()
		say("ogin: ")
		synctest.Wait()
		w.want(t, "a prompt begins", "l")
		time.Sleep(gather)
		synctest.Wait()
		w.want(t, "a prompt", "ogin: ")
		// Lines of one burst are written whole, and when they end.
		o.Put([]byte("\n"))
		synctest.Wait()
		say("one line")
		synctest.Wait()
		w.want(t, "a line has begun", "\n")
		o.Put([]byte("\nand two\n"))
		synctest.Wait()
		w.want(t, "lines", "one line\nand two\n")
		// A guest that prints a byte in each microsecond costs a Write in each
		// millisecond.
		for range 5000 {
			o.Put([]byte("."))
			time.Sleep(time.Microsecond)
		}
		synctest.Wait()
		w.mu.Lock()
		if n := len(w.got); n < 4 || n > 7 {
			t.Errorf("5000 bytes in 5 ms: %d writes", n)
		}
		w.mu.Unlock()
		if err := o.Close(); err != nil {
			t.Error(err)
		}
	})
}

// stuckWriter takes nothing until it is released.
type stuckWriter chan struct{}

func (w stuckWriter) Write(p []byte) (int, error) {
	<-w
	return len(p), nil
}

// A writer that has been stuck for longer than Drain may wait is not waited for at all:
// the guest may stand still meanwhile. One that became slow just now is.
func TestDrainDoesNotWaitForTheStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := make(stuckWriter)
		o := NewOutput(w, 1, func() {})
		o.Put([]byte("line\n"))
		for _, expected := range []time.Duration{50 * time.Millisecond, 0} {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			began := time.Now()
			synctest.Wait() // it is written
			if err := o.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v", err)
			}
			if waited := time.Since(began); waited != expected {
				t.Errorf("waited for %v, want %v", waited, expected)
			}
			cancel()
			time.Sleep(time.Millisecond)
		}
		close(w)
		if err := o.Drain(t.Context()); err != nil {
			t.Error(err)
		}
		if err := o.Close(); err != nil {
			t.Error(err)
		}
	})
}
