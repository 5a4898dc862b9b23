package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/govmm/govmm/mempage"
)

// inlet is one data connection at the destination. One goroutine serves it.
type inlet struct {
	conn    *conn // changed by the goroutine that serves, under the session's dataMu, as is before
	session *session
	number  int         // from 1
	idle    atomic.Bool // it waits for other channels, or has ended

	next   chan *conn    // what takes the place of conn after RENEW
	before uint64        // bytes that came on earlier ones
	done   chan struct{} // closed when it has ended

	meta     spanMeta
	block    []byte // of BLOCKS; nil until needed
	iov      [][]byte
	unpacker unpacker
	staging  []byte // where pages of a [PageWriter] land
}

// roundWait is the barrier that ends a round: nothing that follows it is read from any
// channel before everything that precedes it has landed. So a page that is sent again
// lands after its older content, whichever channels the two took.
type roundWait struct {
	number uint64
	flags  uint8         // of the ROUND: the round is not confirmed, or is the last one
	open   chan struct{} // closed when the last channel has arrived
}

// lastWait is where all channels stand after the last ROUND of a stop: nothing more is
// read from them before the stop is undone.
type lastWait struct {
	landed chan struct{} // closed when all channels stand here
	undone chan struct{} // closed when the stop is undone
}

func newLastWait() *lastWait { return &lastWait{make(chan struct{}), make(chan struct{})} }

// join adds a data connection to the session.
func (s *session) join(number int, c *conn) (*inlet, error) {
	s.dataMu.Lock()
	defer s.dataMu.Unlock()
	switch {
	case s.ended:
		return nil, fmt.Errorf("%w: data channel %d of session %v, which has ended", ErrProtocol, number, s.id)
	case number < 1 || number > len(s.inlets):
		return nil, fmt.Errorf("%w: data channel %d: the session has %d", ErrProtocol, number, len(s.inlets))
	case s.inlets[number-1] != nil:
		return nil, fmt.Errorf("%w: data channel %d is connected already", ErrProtocol, number)
	}
	in := &inlet{conn: c, session: s, number: number, next: make(chan *conn, 1), done: make(chan struct{})}
	s.pulse.add(c.flow)
	s.inlets[number-1] = in
	s.lanes.Add(1)
	if s.missing--; s.missing == 0 {
		close(s.all)
	}
	return in, nil
}

// awaitChannels waits until all data connections have come.
func (s *session) awaitChannels() error {
	t := time.NewTimer(s.timeout)
	defer t.Stop()
	select {
	case <-s.all:
		return nil
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	case <-t.C:
	}
	s.dataMu.Lock()
	defer s.dataMu.Unlock()
	return openly("%d of %d data channels did not come within %v", s.missing, len(s.inlets), s.timeout)
}

// waits reports whether the channel waits for the source.
func (in *inlet) waits() bool { return in.idle.Load() || in.conn.flow.reads.under() }

// serve receives from a data connection until the session's end.
func (in *inlet) serve() {
	s := in.session
	defer s.lanes.Done()
	defer close(in.done)
	defer in.unpacker.close()
	defer in.idle.Store(true)
	in.idle.Store(true)
	select {
	case <-s.ready:
		in.idle.Store(false)
	case <-s.over:
		return
	}
	if err := in.receive(s.machine()); err != nil {
		s.fail(&stepError{fmt.Sprintf("data channel %d", in.number), closedBySource(err)}, isLoss(err))
	}
}

func (in *inlet) receive(target Target) error {
	for {
		f, err := in.conn.readHeader()
		if err != nil {
			return err
		}
		switch {
		case in.session.shared:
			err = in.session.unexpected(f, "nothing: the memory is shared")
		case f.typ == framePages, f.typ == framePacked:
			err = in.apply(target, f)
		case f.typ == frameBlocks:
			err = in.blocks(f)
		case f.typ == frameRound && f.length == 0 && (f.flags == flagLast || f.flags == flagDurable && len(in.session.copies) > 0 || f.flags&^flagQuiet == 0):
			if err = in.endRound(f.first, f.flags); errors.Is(err, errSettled) {
				return nil
			}
		case f.typ == frameRenew && f.length == 0 && slices.Contains(in.session.features, featureRenew):
			if err = in.renew(); errors.Is(err, errSettled) {
				return nil
			}
		default:
			err = in.session.unexpected(f, "PAGES, PACKED or ROUND")
		}
		if err != nil {
			return err
		}
		in.session.whole.Add(1)
	}
}

// endRound returns when the ROUND of every channel has come; after the last one of a stop,
// when that has been undone. The last channel confirms the round to the source.
func (in *inlet) endRound(number uint64, flags uint8) error {
	s := in.session
	s.dataMu.Lock()
	if s.arrived == 0 {
		s.round = roundWait{number: number, flags: flags, open: make(chan struct{})}
	}
	round, last := s.round, s.last
	if round.number != number || round.flags != flags {
		s.dataMu.Unlock()
		return fmt.Errorf("%w: ROUND %d (flags %#x) by one channel, %d (%#x) by another", ErrProtocol, round.number, round.flags, number, flags)
	}
	s.arrived++
	all := s.arrived == len(s.inlets)
	if all {
		s.arrived = 0
	}
	s.dataMu.Unlock()
	if all {
		err := s.ahead.reclaim()
		if flags == flagDurable && err == nil {
			err = s.syncDisks()
		}
		if flags&^flagDurable == 0 && err == nil {
			err = s.echo(number)
		}
		if flags == flagLast && err == nil {
			close(last.landed)
		}
		close(round.open)
		if err != nil {
			return err
		}
	}
	in.idle.Store(true)
	defer in.idle.Store(false)
	select {
	case <-round.open:
	case <-s.over:
		return errOver
	}
	if flags != flagLast {
		return nil
	}
	select {
	case <-last.undone:
		return nil
	case <-s.over:
		return errSettled
	}
}

// errSettled is the end of a session of which every page has landed.
var errSettled = openly("all pages have landed")

var errOver = openly("the session has ended")

// isLoss reports whether an error is the loss of a connection, the reason of which is
// elsewhere.
func isLoss(err error) bool {
	return errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, errOver)
}

// fail ends the session because a channel failed. If its connection was lost, the
// source gets a moment to say why, by the control connection.
func (s *session) fail(err error, loss bool) {
	s.dataMu.Lock()
	if s.failure == nil {
		s.failure = err
		close(s.lost)
	}
	s.dataMu.Unlock()
	if !loss {
		s.cancel(err)
		return
	}
	time.AfterFunc(reasonGrace, func() { s.cancel(err) })
}

// landed is closed when the last ROUND of this stop has come by every data connection.
func (s *session) landed() <-chan struct{} {
	s.dataMu.Lock()
	defer s.dataMu.Unlock()
	return s.last.landed
}

// awaitLanded waits for that, or for a channel that failed: then the source gets a moment
// to say why.
func (s *session) awaitLanded() error {
	s.idle.Store(true)
	defer s.idle.Store(false)
	select {
	case <-s.landed():
		return nil
	case <-s.lost:
	case <-s.over:
	}
	select {
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	case <-s.frames: // the source goes on, and gives no reason
		return s.failed()
	}
}

// failed returns the error of the first channel that failed.
func (s *session) failed() error {
	s.dataMu.Lock()
	defer s.dataMu.Unlock()
	return s.failure
}

// goOn lets the channels go on after the last ROUND of a stop that was undone.
func (s *session) goOn() {
	s.dataMu.Lock()
	defer s.dataMu.Unlock()
	close(s.last.undone)
	s.last = newLastWait()
}

// stopChannels makes the data connections receive nothing more. They stay open until
// the source has been told why.
func (s *session) stopChannels() {
	s.dataMu.Lock()
	defer s.dataMu.Unlock()
	if !s.ended {
		s.ended = true
		close(s.over)
	}
	for _, in := range s.inlets {
		if in != nil {
			in.conn.interrupt()
		}
	}
}

// closeChannels closes the data connections of a session that is settled: afterwards
// nothing writes to memory.
func (s *session) closeChannels() {
	for _, in := range s.inlets { // complete: no channel joins a session that has ended
		if in != nil {
			in.conn.Close()
		}
	}
	s.ahead.end()
}

// pass notes up to which page of memory, or block of the disks that are copied, a
// pass has come. Channels are close enough to one another.
func (s *session) pass(disks bool, slot int, to uint64) {
	for i := range slot {
		if disks {
			to += blocksOf(s.copies[i].Size())
		} else {
			to += s.slots[i].Pages
		}
	}
	if to <<= 1; disks {
		to |= 1
	}
	s.passed.Store(to)
}

// passing is what comes, how many bytes of it the pass has passed, and all of it.
func (s *session) passing() (what string, passed, all uint64) {
	at := s.passed.Load()
	switch {
	case at == 0: // slots and copies may not be there yet
		return "", 0, 0
	case at&1 == 1:
		for _, c := range s.copies {
			all += c.Size()
		}
		return "disks", min(at>>1*BlockSize, all), all
	}
	for _, slot := range s.slots {
		all += slot.Pages * mempage.Size
	}
	return "memory", at >> 1 * mempage.Size, all
}

// received is the number of bytes that arrived on all connections, without ALIVE.
func (s *session) received() uint64 {
	n := s.conn.flow.received.Load() - s.conn.flow.aliveIn.Load()
	s.dataMu.Lock()
	defer s.dataMu.Unlock()
	for _, in := range s.inlets {
		if in != nil {
			n += in.before + in.conn.flow.received.Load()
		}
	}
	return n
}
