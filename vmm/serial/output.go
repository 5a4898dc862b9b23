package serial

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// queueSize is how many bytes of output may wait for the backend.
	queueSize = 64 << 10
	// chunkSize is the most that is written at once, and enough not to wait.
	chunkSize = 4096
	// flushIdle is how long a line that has begun waits for its next byte, and
	// flushMost how long its first byte waits at most. A newline ends the wait:
	// lines come out whole and at once, and one that a migration cuts is
	// mostly still here.
	flushIdle = 20 * time.Millisecond
	flushMost = 100 * time.Millisecond
)

// output is a queue of bytes and the goroutine that writes them.
type output struct {
	w     io.Writer
	ready func()        // called without locks when room comes to fifoSize again
	wake  chan struct{} // to the writer: something below has changed
	done  chan struct{} // closed when the writer has ended

	// queueMu guards all below.
	queueMu sync.Mutex
	queue   []byte        // not yet given to w
	writing int           // bytes that w has been given in the Write under way
	due     bool          // what is queued is written now, an unfinished line too
	held    bool          // an unfinished line stays
	closed  bool          // the writer ends; what is put is dropped
	err     error         // the first of w
	empty   chan struct{} // if not nil, closed when nothing is left to write
}

func newOutput(w io.Writer, ready func()) *output {
	o := &output{
		w:     w,
		ready: ready,
		wake:  make(chan struct{}, 1),
		done:  make(chan struct{}),
		queue: make([]byte, 0, queueSize),
	}
	go o.run()
	return o
}

// put queues a byte, or drops it when there is no room, and returns the room
// left in bytes.
func (o *output) put(b byte) int {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	if o.closed {
		return queueSize
	}
	room := queueSize - len(o.queue) - o.writing
	if room == 0 {
		return 0
	}
	o.queue = append(o.queue, b)
	full := len(o.queue) >= chunkSize || room-1 < fifoSize
	o.due = o.due || full
	if full || b == '\n' || len(o.queue) == 1 {
		o.wakeUp()
	}
	return room - 1
}

// room returns how many bytes may be put.
func (o *output) room() int {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	return queueSize - len(o.queue) - o.writing
}

// wakeUp makes the writer look again.
func (o *output) wakeUp() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// run is the writer.
func (o *output) run() {
	defer close(o.done)
	timer := time.NewTimer(flushIdle)
	timer.Stop()
	buf := make([]byte, chunkSize)
	for {
		n, ok := o.take(buf, timer)
		if !ok {
			return
		}
		_, err := o.w.Write(buf[:n])
		if o.wrote(err) {
			o.ready()
		}
	}
}

// take waits for a batch and copies it to buf. It returns false at the end.
func (o *output) take(buf []byte, timer *time.Timer) (int, bool) {
	defer timer.Stop()
	seen := 0 // bytes that were queued when the timer was set, 0 if it is not
	var since time.Time
	for {
		o.queueMu.Lock()
		if o.closed {
			o.queue = o.queue[:0]
			o.settle()
			o.queueMu.Unlock()
			return 0, false
		}
		if n := o.leaving(); n > 0 {
			n = copy(buf, o.queue[:n])
			o.queue = o.queue[:copy(o.queue, o.queue[n:])]
			o.writing = n
			o.due = o.due && len(o.queue) > 0
			o.queueMu.Unlock()
			return n, true
		}
		queued, held := len(o.queue), o.held
		o.queueMu.Unlock()
		if queued > 0 && seen == 0 && !held {
			seen, since = queued, time.Now()
			timer.Reset(flushIdle)
		}
		select {
		case <-o.wake:
		case <-timer.C:
			if queued = o.queued(); queued > seen && time.Since(since) < flushMost {
				seen = queued
				timer.Reset(flushIdle)
				continue
			}
			seen = 0
			o.queueMu.Lock()
			o.due = true
			o.queueMu.Unlock()
		}
	}
}

func (o *output) queued() int {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	return len(o.queue)
}

// leaving is how much of the queue may be written now: whole lines, and all
// that is there when it is due. queueMu is held.
func (o *output) leaving() int {
	if o.due && !o.held {
		return len(o.queue)
	}
	return bytes.LastIndexByte(o.queue, '\n') + 1
}

// hold keeps an unfinished line in the queue from now on.
func (o *output) hold(held bool) {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	o.held = held
	o.settle()
	o.wakeUp()
}

// heldLine is the unfinished line, if it is held.
func (o *output) heldLine() []byte {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	if !o.held {
		return nil
	}
	return append([]byte(nil), o.queue[bytes.LastIndexByte(o.queue, '\n')+1:]...)
}

// wrote accounts for the end of a Write, and says whether there is room again
// for a FIFO's worth of bytes where there was none.
func (o *output) wrote(err error) bool {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	before := queueSize - len(o.queue) - o.writing
	o.writing = 0
	if err != nil && o.err == nil {
		o.err = err
	}
	o.settle()
	return before < fifoSize && queueSize-len(o.queue) >= fifoSize
}

// settle tells those who wait in drain when nothing is left. queueMu is held.
func (o *output) settle() {
	if o.leaving() == 0 && o.writing == 0 && o.empty != nil {
		close(o.empty)
		o.empty = nil
	}
}

// drain waits until everything that may leave has been written.
func (o *output) drain(ctx context.Context) error {
	o.queueMu.Lock()
	o.due = !o.held && len(o.queue) > 0
	left := o.leaving() + o.writing
	if left == 0 {
		o.queueMu.Unlock()
		return nil
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
		return fmt.Errorf("serial output of %d bytes that the backend does not take: %w", left, ctx.Err())
	}
}

// close ends the writer, which may have to wait for the Write under way, and
// returns the first error of w.
func (o *output) close() error {
	o.queueMu.Lock()
	o.closed = true
	o.queueMu.Unlock()
	o.wakeUp()
	<-o.done
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	if o.err != nil {
		return fmt.Errorf("serial output: %w", o.err)
	}
	return nil
}

// Drain waits until the backend has taken all that the guest has sent, but for
// a line that is held, or until ctx ends, whose error it returns then. A guest
// that goes on sending can keep it waiting.
func (u *UART) Drain(ctx context.Context) error { return u.out.drain(ctx) }

// HoldLine says whether a line that the guest has begun and not ended is kept
// back. It is while the guest stands still for a handoff: the line then travels
// in the [State], and the twin prints it whole.
func (u *UART) HoldLine(hold bool) { u.out.hold(hold) }

// Close ends the goroutine that writes output; what the backend has not taken
// is lost ([UART.Drain] first). It waits for a Write under way: close a backend
// that is stuck before the UART. The first error that writing met is returned.
// The port may still be used; its output goes nowhere.
func (u *UART) Close() error { return u.out.close() }
