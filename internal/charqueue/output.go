// Package charqueue moves characters between a device of the guest, a serial
// port or a console, and the host. Neither direction loses a byte, and neither
// makes the guest wait.
package charqueue

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// Size is how many bytes of output can wait for the writer.
	Size = 64 << 10
	// MaxLine is the most that is written at once: a line of that length is
	// written before its end.
	MaxLine = 4096
	// gather is the least time between two writes, unless the later one ends a
	// line: what comes to an idle line is written at once, and a guest that
	// prints byte by byte does not cost a write for each.
	gather = time.Millisecond
)

// Output is a queue of bytes and the goroutine that writes them.
type Output struct {
	w     io.Writer
	low   int
	ready func()
	wake  chan struct{} // to the goroutine: something below has changed
	done  chan struct{} // closed when the goroutine has ended

	// queueMu guards all below.
	queueMu sync.Mutex
	queue   []byte        // not yet given to w
	writing int           // bytes in the Write under way
	last    time.Time     // when the last Write ended, or that under way began
	due     bool          // the line that has begun is written now
	held    bool          // the line that has begun stays
	closed  bool          // the goroutine ends; what is put is dropped
	err     error         // the first of w
	empty   chan struct{} // if not nil, closed when nothing is left to write
}

// NewOutput makes a queue whose bytes are written to w. ready is called,
// without locks, when there is room for low bytes again where there was not.
func NewOutput(w io.Writer, low int, ready func()) *Output {
	o := &Output{
		w: w, low: low, ready: ready,
		wake: make(chan struct{}, 1), done: make(chan struct{}), queue: make([]byte, 0, Size),
	}
	go o.run()
	return o
}

// Put queues as much of p as there is room for, and returns how much that was.
// After Close everything fits, and is dropped.
func (o *Output) Put(p []byte) int {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	if o.closed {
		return len(p)
	}
	n := min(len(p), o.room())
	first := len(o.queue) == 0
	o.queue = append(o.queue, p[:n]...)
	if first || len(o.queue) >= MaxLine || bytes.IndexByte(p[:n], '\n') >= 0 {
		o.wakeUp()
	}
	return n
}

// Room returns how many bytes Put takes.
func (o *Output) Room() int {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	return o.room()
}

func (o *Output) room() int {
	if o.closed {
		return Size
	}
	return Size - len(o.queue) - o.writing
}

func (o *Output) wakeUp() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

func (o *Output) run() {
	defer close(o.done)
	buf := make([]byte, MaxLine)
	timer := time.NewTimer(gather)
	defer timer.Stop()
	for {
		n, wait, ok := o.take(buf)
		switch {
		case !ok:
			return
		case n > 0:
			_, err := o.w.Write(buf[:n])
			if o.wrote(err) {
				o.ready()
			}
			continue
		case wait > 0:
			timer.Reset(wait)
		default:
			timer.Stop()
		}
		select {
		case <-o.wake:
		case <-timer.C:
		}
	}
}

// take copies to buf what is to be written now. If that is nothing it returns
// how long a line that has begun still waits; and false at the end.
func (o *Output) take(buf []byte) (n int, wait time.Duration, ok bool) {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	if o.closed {
		o.queue = nil
		o.settle()
		return 0, 0, false
	}
	n = o.leaving()
	if n == 0 && !o.held && len(o.queue) > 0 {
		if wait = gather - time.Since(o.last); wait > 0 {
			return 0, wait, true
		}
		n = len(o.queue)
	}
	n = copy(buf, o.queue[:n])
	o.queue = o.queue[:copy(o.queue, o.queue[n:])]
	o.writing = n
	if n > 0 {
		o.last = time.Now()
	}
	o.due = o.due && len(o.queue) > 0
	return n, 0, true
}

// leaving is how much of the queue may be written now: whole lines, and all of
// it when that is due, or is more than a line. queueMu is held.
func (o *Output) leaving() int {
	if !o.held && (o.due || len(o.queue) >= MaxLine) {
		return len(o.queue)
	}
	return bytes.LastIndexByte(o.queue, '\n') + 1
}

// wrote accounts for the end of a Write, and returns whether there is room for
// low bytes again.
func (o *Output) wrote(err error) bool {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	before := o.room()
	o.writing, o.last = 0, time.Now()
	if err != nil && o.err == nil {
		o.err = err
	}
	o.settle()
	return before < o.low && o.room() >= o.low
}

// settle ends Drain when nothing is left. queueMu is held.
func (o *Output) settle() {
	if o.empty != nil && o.writing == 0 && o.leaving() == 0 {
		close(o.empty)
		o.empty = nil
	}
}

// Hold says whether a line that has begun stays in the queue until its end.
func (o *Output) Hold(held bool) {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	o.held = held
	o.settle()
	o.wakeUp()
}

// Line is the beginning of a line that Hold keeps.
func (o *Output) Line() []byte {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	if !o.held {
		return []byte{}
	}
	return append([]byte{}, o.queue[bytes.LastIndexByte(o.queue, '\n')+1:]...)
}

// Drain waits until the writer has taken everything, except for a line that
// Hold keeps, or until ctx ends. It does not wait for a writer that has taken nothing
// for longer than the time until ctx ends.
func (o *Output) Drain(ctx context.Context) error {
	o.queueMu.Lock()
	o.due = !o.held && len(o.queue) > 0
	left := o.leaving() + o.writing
	if left == 0 {
		o.queueMu.Unlock()
		return nil
	}
	if end, ok := ctx.Deadline(); ok && o.writing > 0 && time.Since(o.last) > time.Until(end) {
		o.queueMu.Unlock()
		return fmt.Errorf("%d bytes of output that the backend does not take: %w", left, context.DeadlineExceeded)
	}
	if o.empty == nil {
		o.empty = make(chan struct{})
	}
	empty := o.empty
	o.queueMu.Unlock()
	o.wakeUp()
	select {
	case <-empty:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%d bytes of output that the backend does not take: %w", left, context.Cause(ctx))
	}
}

// Close ends the goroutine, and drops what is left ([Output.Drain] first). It
// waits for a Write under way. It returns the first error of the writer.
func (o *Output) Close() error {
	o.queueMu.Lock()
	o.closed = true
	o.queueMu.Unlock()
	o.wakeUp()
	<-o.done
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	return o.err
}
