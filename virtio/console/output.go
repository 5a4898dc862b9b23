package console

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// outputSize is how many bytes of output may wait for the writer.
	outputSize = 64 << 10
	// chunkSize is the most that is written at once.
	chunkSize = 4096
	// lineWait is how long the beginning of a line waits for its end, so that
	// lines come out whole, as far as they do.
	lineWait = 50 * time.Millisecond
)

// output is a queue of bytes and the goroutine that writes them.
type output struct {
	w    io.Writer
	room chan<- struct{} // there is room again where there was none
	wake chan struct{}   // to the goroutine: something below has changed
	done chan struct{}   // closed when the goroutine has ended

	// queueMu guards all below.
	queueMu sync.Mutex
	queue   []byte
	writing int  // bytes in the Write under way
	starved bool // somebody waits for room
	due     bool // the beginning of a line is not kept back any longer
	held    bool // it is kept back for ever
	closed  bool
	err     error         // the first of w
	empty   chan struct{} // if not nil, closed when nothing is left to write
}

func newOutput(w io.Writer, room chan<- struct{}) *output {
	o := &output{w: w, room: room, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go o.run()
	return o
}

// put queues as much of p as there is room for, and returns how much it was.
// After the end everything fits, and goes nowhere.
func (o *output) put(p []byte) int {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	if o.closed {
		return len(p)
	}
	n := min(len(p), outputSize-len(o.queue)-o.writing)
	o.queue = append(o.queue, p[:n]...)
	o.starved = o.starved || n < len(p)
	signal(o.wake)
	return n
}

// full says that there is no room; room is signalled when there is again.
func (o *output) full() bool {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	full := !o.closed && len(o.queue)+o.writing >= outputSize
	o.starved = o.starved || full
	return full
}

// ended says that the output goes nowhere any more.
func (o *output) ended() bool {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	return o.closed
}

func (o *output) run() {
	defer close(o.done)
	buf := make([]byte, chunkSize)
	var timer <-chan time.Time // runs while the beginning of a line waits
	for {
		o.queueMu.Lock()
		if o.closed {
			o.queue = nil
			o.settle()
			o.queueMu.Unlock()
			return
		}
		n := copy(buf, o.queue[:o.leaving()])
		o.queue = o.queue[:copy(o.queue, o.queue[n:])]
		o.writing = n
		waits := len(o.queue) > 0 && !o.held
		o.queueMu.Unlock()
		if n > 0 {
			timer = nil
			_, err := o.w.Write(buf[:n])
			o.wrote(err)
			continue
		}
		if !waits {
			timer = nil
		} else if timer == nil {
			timer = time.After(lineWait)
		}
		select {
		case <-o.wake:
		case <-timer:
			timer = nil
			o.queueMu.Lock()
			o.due = true
			o.queueMu.Unlock()
		}
	}
}

// leaving is how much of the queue may be written now: whole lines, and all of
// it when it is due, or is more than a line. queueMu is held.
func (o *output) leaving() int {
	if !o.held && (o.due || len(o.queue) >= chunkSize) {
		return len(o.queue)
	}
	return bytes.LastIndexByte(o.queue, '\n') + 1
}

// wrote accounts for the end of a Write.
func (o *output) wrote(err error) {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	o.writing = 0
	o.due = o.due && len(o.queue) > 0
	if err != nil && o.err == nil {
		o.err = err
	}
	if o.starved {
		o.starved = false
		signal(o.room)
	}
	o.settle()
}

// settle tells those who wait in drain when nothing is left. queueMu is held.
func (o *output) settle() {
	if o.empty != nil && o.writing == 0 && o.leaving() == 0 {
		close(o.empty)
		o.empty = nil
	}
}

// hold says whether the beginning of a line is kept back.
func (o *output) hold(held bool) {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	o.held = held
	o.settle()
	signal(o.wake)
}

// line is the beginning of a line that is kept back.
func (o *output) line() []byte {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	if !o.held {
		return []byte{}
	}
	return append([]byte{}, o.queue[bytes.LastIndexByte(o.queue, '\n')+1:]...)
}

// restore makes line what is queued, and keeps it back.
func (o *output) restore(line []byte) {
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	o.queue, o.held, o.due = bytes.Clone(line), true, false
	o.settle()
}

// drain waits until everything that may leave has been written.
func (o *output) drain(ctx context.Context) error {
	o.queueMu.Lock()
	o.due = len(o.queue) > 0
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
	signal(o.wake)
	select {
	case <-empty:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("console output of %d bytes that the backend does not take: %w", left, context.Cause(ctx))
	}
}

// close ends the goroutine and returns the first error of w.
func (o *output) close() error {
	o.queueMu.Lock()
	o.closed = true
	if o.starved {
		o.starved = false
		signal(o.room)
	}
	o.queueMu.Unlock()
	signal(o.wake)
	<-o.done
	o.queueMu.Lock()
	defer o.queueMu.Unlock()
	if o.err != nil {
		return fmt.Errorf("console output: %w", o.err)
	}
	return nil
}
