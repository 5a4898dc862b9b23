package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// link is the source's end of a migration's connections: the control connection,
// and those that carry pages. A goroutine reads the replies, so that a destination
// that fails or dies is noticed while pages are sent.
type link struct {
	conn   *conn
	ctx    context.Context // ends when the destination fails, or the caller's context does
	cancel context.CancelCauseFunc
	rtt    time.Duration
	// forgotten is the number of the last stop that was undone: a PREPARED for it may
	// still come. It belongs to whoever awaits replies.
	forgotten uint64

	pulse    *pulse
	awaiting atomic.Int32 // replies that are awaited

	// data are the connections that carry pages, set by openChannels.
	data     []*lane
	dial     func(number int, renews bool) (*conn, error) // a data connection
	flushed  atomic.Bool                                  // the last frame of every data connection is on its way
	watchers sync.WaitGroup                               // of data connections

	replies chan reply
	done    chan struct{} // the reader has ended
	closed  chan struct{}
}

type reply struct {
	header
	payload []byte
}

func newLink(parent context.Context, c *conn, timeout time.Duration) *link {
	l := &link{conn: c, replies: make(chan reply), done: make(chan struct{}), closed: make(chan struct{})}
	l.ctx, l.cancel = context.WithCancelCause(parent)
	l.pulse = startPulse(c, timeout, func() bool { return l.awaiting.Load() > 0 }, nil, func(err error) { l.cancel(fmt.Errorf("%w: %w", errLostPeer, err)) })
	// A write that hangs gets time to finish its frame.
	context.AfterFunc(l.ctx, func() { time.AfterFunc(endGrace, func() { c.Close() }) })
	go l.read()
	return l
}

// endGrace bounds what a migration that ends still sends.
const endGrace = time.Second

// read passes on replies until the connection ends.
func (l *link) read() {
	defer close(l.done)
	for {
		r, err := l.readReply()
		if err != nil {
			l.cancel(err)
			return
		}
		select {
		case l.replies <- r:
		case <-l.closed:
			return
		}
	}
}

// readReply reads one frame that is no ALIVE. A frame that ends the migration is an error.
func (l *link) readReply() (reply, error) {
	h, err := l.conn.readHeader()
	for err == nil && h.typ == frameAlive {
		if err := l.pulse.took(h); err != nil {
			return reply{}, err
		}
		h, err = l.conn.readHeader()
	}
	switch {
	case errors.Is(err, ErrRefused): // by TLS
		return reply{}, err
	case err != nil:
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = errors.New("it closed the connection")
		}
		return reply{}, fmt.Errorf("%w: %w", errLostPeer, err)
	}
	b, err := l.conn.readPayload(h, maxControl)
	if err != nil {
		return reply{}, err
	}
	switch h.typ {
	case frameRefused:
		var r refused
		if err := decodeControl(h.typ, b, &r); err != nil {
			return reply{}, err
		}
		return reply{}, refusal(r.Reasons)
	case frameFailed:
		var r reason
		if err := decodeControl(h.typ, b, &r); err != nil {
			return reply{}, err
		}
		return reply{}, &failedError{clip(r.Reason)}
	}
	return reply{h, b}, nil
}

// failedError is a FAILED: the destination gave up and will not run the guest.
type failedError struct{ reason string }

func (e *failedError) Error() string { return "the destination gave up: " + e.reason }

// await returns the next reply, which must be of type want. It waits for as long as the
// destination lives.
func (l *link) await(ctx context.Context, want frameType) (reply, error) {
	l.awaiting.Add(1)
	defer l.awaiting.Add(-1)
	for {
		select {
		case r := <-l.replies:
			if r.typ == framePrepared && r.first <= l.forgotten {
				continue
			}
			if r.typ != want {
				return reply{}, fmt.Errorf("%w: the destination sent %v instead of %v", ErrProtocol, r.typ, want)
			}
			return r, nil
		case <-ctx.Done():
			return reply{}, context.Cause(ctx)
		}
	}
}

// awaitWithin is await for a reply that takes the destination no work.
func (l *link) awaitWithin(ctx context.Context, want frameType, timeout time.Duration) (reply, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("the destination is silent: no %v within %v", want, timeout))
	defer cancel()
	return l.await(ctx, want)
}

// explain returns the reason why the link ended, if it did: the reader's error says
// more than the writer's broken pipe.
func (l *link) explain(err error) error {
	if cause := context.Cause(l.ctx); cause != nil {
		return cause
	}
	return err
}

// end tells the destination why the migration ends, if that is still possible, and
// returns the reason.
func (l *link) end(err error) error {
	if joined, ok := err.(interface{ Unwrap() []error }); !ok || len(joined.Unwrap()) < 2 {
		err = l.explain(err)
	}
	l.conn.writeLast(frameAbort, reason{clip(err.Error())}, endGrace)
	l.close()
	return err
}

// close is idempotent.
func (l *link) close() {
	select {
	case <-l.closed:
		return
	default:
	}
	close(l.closed)
	l.conn.Close()
	for _, n := range l.data {
		n.close()
	}
	l.cancel(net.ErrClosed)
	l.pulse.end()
	<-l.done
	l.watchers.Wait()
}
