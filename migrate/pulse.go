package migrate

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// pulse tells the peer of a session that this side lives, by an ALIVE every so often,
// and finds out when the peer does not.
//
// A peer is dead when nothing at all comes from it for the time-out. One that lives may
// take as long as it needs, while bytes move or it is at work. But if both sides wait
// for each other, and nothing moves, then something was lost on the way: each says by
// its ALIVE whether it is idle in this sense, and when both have been for the time-out
// the session is over too.
//
// Time is counted in ticks that this process has seen, so that it does not blame the
// peer for a time in which it was itself stopped.
type pulse struct {
	control *conn
	timeout time.Duration
	waits   func() bool // this side waits for something to come; for room, the flows know
	dead    func(error) // called once
	// limit is called at each tick, with whether this side waits; its error ends the
	// session too. nil: there is none.
	limit func(waits bool) error

	flowsMu sync.Mutex // guards flows
	flows   []*flow

	heard    atomic.Uint64 // ALIVE frames that came
	peerIdle atomic.Bool   // said by the last one
	idle     atomic.Bool   // to be said by the next one
	stop     chan struct{}
	ended    sync.WaitGroup
}

const (
	aliveEvery = 2 * time.Second
	// pulseTicks is how often in its time-out a side looks whether something has moved.
	pulseTicks = 10
)

// aliveInterval is how often, in milliseconds, a side with a time-out wants to hear from
// its peer.
func aliveInterval(timeout time.Duration) uint16 {
	return uint16(max(min(aliveEvery, timeout/5)/time.Millisecond, 1))
}

// aliveSpan is the time between two ALIVE frames that a peer has asked for.
func aliveSpan(milliseconds uint16) time.Duration {
	if milliseconds == 0 {
		return aliveEvery
	}
	return min(max(time.Duration(milliseconds)*time.Millisecond, 10*time.Millisecond), aliveEvery)
}

// startPulse begins to look. Nothing is said before beat.
func startPulse(control *conn, timeout time.Duration, waits func() bool, limit func(bool) error, dead func(error)) *pulse {
	p := &pulse{control: control, timeout: timeout, waits: waits, limit: limit, dead: dead, flows: []*flow{control.flow}, stop: make(chan struct{})}
	p.ended.Go(p.watch)
	return p
}

// add adds a connection to the session.
func (p *pulse) add(f *flow) {
	p.flowsMu.Lock()
	defer p.flowsMu.Unlock()
	p.flows = append(p.flows, f)
}

// drop removes a connection of the session, which has been read to its end.
func (p *pulse) drop(f *flow) {
	p.flowsMu.Lock()
	defer p.flowsMu.Unlock()
	p.flows = slices.DeleteFunc(p.flows, func(g *flow) bool { return g == f })
}

// beat begins to say ALIVE as often as the peer asked for.
func (p *pulse) beat(milliseconds uint16) {
	p.ended.Go(func() {
		t := time.NewTicker(aliveSpan(milliseconds))
		defer t.Stop()
		for {
			select {
			case <-t.C:
				p.control.writeAlive(p.idle.Load())
			case <-p.stop:
				return
			}
		}
	})
}

// took takes an ALIVE.
func (p *pulse) took(h header) error {
	if h.length != 0 {
		return fmt.Errorf("%w: ALIVE of %d bytes", ErrProtocol, h.length)
	}
	p.control.flow.aliveIn.Add(p.control.aliveSize())
	p.peerIdle.Store(h.flags&flagIdle != 0)
	p.heard.Add(1)
	return nil
}

// look returns a number that changes whenever something moves on any of the connections,
// and whether a write waits for room.
func (p *pulse) look() (moved uint64, full bool) {
	p.flowsMu.Lock()
	defer p.flowsMu.Unlock()
	for _, f := range p.flows {
		moved += f.moved()
		full = full || f.writes.under()
	}
	return moved, full
}

func (p *pulse) watch() {
	if p.timeout <= 0 {
		return
	}
	t := time.NewTicker(max(p.timeout/pulseTicks, time.Microsecond))
	defer t.Stop()
	var moved, heard uint64
	var waited, still, silent int // ticks: this side has waited, nothing moved, nothing came
	for {
		select {
		case <-t.C:
		case <-p.stop:
			return
		}
		waited, still, silent = waited+1, still+1, silent+1
		if n := p.heard.Load(); n != heard {
			heard, silent = n, 0
		}
		n, full := p.look()
		if n != moved {
			moved, still, silent = n, 0, 0
		}
		if !full && !p.waits() {
			waited = 0
		}
		p.idle.Store(min(waited, still) >= 2)
		var err error
		if p.limit != nil {
			err = p.limit(waited > 0)
		}
		switch {
		case err != nil:
		case min(waited, silent) >= pulseTicks:
			err = openly("the peer has been silent for %v", p.timeout)
		case min(waited, still) >= pulseTicks && p.peerIdle.Load():
			err = openly("nothing has arrived for %v, and the peer waits for this side: a connection is stuck", p.timeout)
		default:
			continue
		}
		p.dead(err)
		return
	}
}

// end stops both, and waits for them. A write under way has been given a deadline.
func (p *pulse) end() {
	close(p.stop)
	p.ended.Wait()
}
