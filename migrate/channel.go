package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// The source's data connections. The destination sends nothing on them except
// REFUSED, so a read that returns means that the connection has ended.

// openChannels dials the data connections that the destination granted.
func (l *link) openChannels(m *Migration, ok helloOK) error {
	if ok.Channels < 1 || int(ok.Channels) > m.opt.Channels {
		return fmt.Errorf("%w: the destination granted %d data connections, expected between 1 and %d", ErrProtocol, ok.Channels, m.opt.Channels)
	}
	l.dial = func(number int, renews bool) (*conn, error) {
		h := newHello(purposeData, m.session)
		h.channel, h.renews = uint16(number), renews
		return m.peer.connect(l.ctx, h)
	}
	conns := make([]*conn, ok.Channels)
	errs := make([]error, len(conns))
	var dials sync.WaitGroup
	for i := range conns {
		dials.Go(func() {
			conns[i], errs[i] = l.dial(i+1, false)
		})
	}
	dials.Wait()
	for i, c := range conns {
		if c != nil {
			l.data = append(l.data, newLane(i+1, c)) // to be closed, at least
		}
		if errs[i] != nil {
			errs[i] = fmt.Errorf("data channel %d: %w", i+1, errs[i])
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	// These may end at once; the control connection gets time for a last message.
	context.AfterFunc(l.ctx, func() {
		for _, n := range l.data {
			n.close()
		}
	})
	for i, c := range conns {
		l.pulse.add(c.flow)
		l.watchers.Go(func() { l.watch(i+1, c) })
	}
	return nil
}

// watch ends the migration when a data connection does.
func (l *link) watch(number int, c *conn) {
	h, err := c.readHeader()
	switch {
	case err == nil && h.typ == frameRefused:
		var r refused
		if err = c.readControl(h, &r); err == nil {
			err = refusal(r.Reasons)
		}
	case err == nil:
		err = fmt.Errorf("%w: the destination sent %v", ErrProtocol, h.typ)
	case errors.Is(err, ErrRefused): // by TLS
	case c.renewed.Load():
		l.pulse.drop(c.flow) // it has been read to its end
		return
	case l.flushed.Load():
		return // all has been sent; the rest is up to the control connection
	case errors.Is(err, io.ErrUnexpectedEOF):
		err = fmt.Errorf("%w: it closed the connection", errLostPeer)
	default:
		err = fmt.Errorf("%w: %w", errLostPeer, err)
	}
	_ = l.channelEnded(fmt.Errorf("data channel %d: %w", number, err)) // others get the reason from the context
}

// reasonGrace is how long a data connection that has ended waits for the reason,
// which comes by the control connection.
const reasonGrace = 300 * time.Millisecond

// channelEnded ends the migration because a data connection has ended, and returns
// the best known reason: the destination's own, if it comes in time.
func (l *link) channelEnded(err error) error {
	t := time.NewTimer(reasonGrace)
	defer t.Stop()
	select {
	case <-l.ctx.Done():
	case <-l.done:
	case <-t.C:
	}
	l.cancel(err)
	return context.Cause(l.ctx)
}

// fence separates two passes between which the source does not wait, so that the
// second one's content of a page lands later. One connection needs no fence.
func (l *link) fence(s *sender, round int) error {
	if len(l.data) == 1 {
		return nil
	}
	return s.flush(round, flagQuiet)
}

// endRound ends a round of disks alone on every connection.
func (l *link) endRound(number uint64, flags uint8) error {
	for _, n := range l.data {
		c, err := l.room(n, headerSize)
		if err == nil {
			err = c.writeFrame(header{typ: frameRound, flags: flags, first: number})
		}
		if err != nil {
			return l.channelEnded(fmt.Errorf("data channel %d: %w", n.number, err))
		}
	}
	return nil
}

// endPages ends the last round: the destination loads the state when the last frame
// of every data connection has come.
func (l *link) endPages(s *sender, round int) error {
	l.flushed.Store(true)
	return s.flush(round, flagLast)
}

// sent is the number of bytes that went out on all connections.
func (l *link) sent() uint64 {
	n := l.conn.flow.sent.Load()
	for _, c := range l.data {
		n += c.sent()
	}
	return n
}

// channelBytes is the number of bytes that went out on each data connection.
func (l *link) channelBytes() []uint64 {
	out := make([]uint64, len(l.data))
	for i, c := range l.data {
		out[i] = c.sent()
	}
	return out
}

// queued is the number of bytes on all connections that the destination's
// kernel has not yet acknowledged; ok is false where that cannot be known.
func (l *link) queued() (n int, ok bool) {
	for _, c := range l.data {
		q, known := c.current().flow.queued()
		if !known {
			return 0, false
		}
		n += q
	}
	return n, true
}
