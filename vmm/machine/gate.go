package machine

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// hold is a reason why the vCPUs stand still. They run when there is none.
type hold uint8

const (
	holdStart   hold = 1 << iota // the machine has not been started
	holdUser                     // somebody paused it
	holdHandoff                  // it is being handed over
)

// kicker is a vCPU as the gate sees it.
type kicker interface {
	// Kick makes a KVM_RUN under way, and every later one, return EINTR until
	// SetImmediateExit(false).
	Kick() error
	SetImmediateExit(bool)
}

// gate is what every vCPU passes before it enters the guest. Closing it stops all
// of them, without polling. A closed gate is a flag that vCPUs read, a kick for
// those that are in the guest, and two conditions: the vCPUs wait on one, and who
// closed the gate on the other.
type gate struct {
	// closed is set while holds or rests is not 0, or ended is set: the fast
	// path of admit, which takes no lock.
	closed atomic.Bool

	// turnMu is held through a whole hold or release, so that a release does not
	// overtake a hold that waits for vCPUs. It is taken before gateMu.
	turnMu sync.Mutex

	gateMu  sync.Mutex // guards holds, rests, ended, live, parked and the writing of closed
	opened  *sync.Cond // holds and rests are 0, or ended is set: for vCPUs
	stopped *sync.Cond // all live vCPUs are parked, or ended is set: for hold
	holds   hold
	// rests counts the callers that keep vCPUs out of the guest for a moment. The
	// machine counts as running, and the guest is not told that it stood still.
	rests  int
	ended  bool
	live   int // vCPUs whose goroutine runs
	parked int // of those, how many stand still at the gate

	vcpus []kicker // does not change once a vCPU runs

	throttleMu sync.Mutex // guards throttling
	throttling *throttle  // nil: at full speed
}

func newGate() *gate {
	g := &gate{holds: holdStart}
	g.opened, g.stopped = sync.NewCond(&g.gateMu), sync.NewCond(&g.gateMu)
	g.closed.Store(true)
	return g
}

// admit lets a vCPU go into KVM_RUN, or keeps it until it may; false means
// that the machine has ended.
//
// pending says that the last KVM_RUN ended with an exit: its port or memory
// access is completed by the next one only. Such a vCPU is let through a
// closed gate with immediate exit set, again and again until the kernel has
// nothing left to do and returns EINTR (R5). kicked says that it did.
func (g *gate) admit(v kicker, pending, kicked bool) bool {
	if !kicked && !g.closed.Load() {
		return true
	}
	g.gateMu.Lock()
	defer g.gateMu.Unlock()
	for {
		switch {
		case g.ended:
			return false
		case g.holds == 0 && g.rests == 0:
			v.SetImmediateExit(false)
			return true
		case pending:
			v.SetImmediateExit(true)
			return true
		}
		g.parked++
		if g.parked == g.live {
			g.stopped.Broadcast()
		}
		g.opened.Wait()
		g.parked--
	}
}

// errEnded is the gate's error once the machine has ended.
var errEnded = errors.New("the machine has ended")

// hold closes the gate and returns when every vCPU stands still at it, with the
// holds there were before. It fails with errEnded, with ErrHandoff if there is one
// of the holds in unless, and when ctx ends first: then it holds nothing new.
func (g *gate) hold(ctx context.Context, h, unless hold) (before hold, err error) {
	g.turnMu.Lock()
	defer g.turnMu.Unlock()
	g.gateMu.Lock()
	defer g.gateMu.Unlock()
	if err := g.refuse(unless); err != nil {
		return g.holds, err
	}
	before = g.holds
	g.holds |= h
	g.closed.Store(true)
	g.kick()
	wake := context.AfterFunc(ctx, func() {
		g.gateMu.Lock()
		defer g.gateMu.Unlock()
		g.stopped.Broadcast()
	})
	defer wake()
	for g.parked < g.live && !g.ended {
		if err := context.Cause(ctx); err != nil {
			g.holds = before
			g.reopen()
			return before, fmt.Errorf("a vCPU does not leave the guest: %w", err)
		}
		g.stopped.Wait()
	}
	return before, g.refuse(0)
}

// release takes a hold away; vCPUs run when it was the last one. lastCall is
// called before they do. It fails as hold does.
func (g *gate) release(h, unless hold, lastCall func()) error {
	g.turnMu.Lock()
	defer g.turnMu.Unlock()
	g.gateMu.Lock()
	err := g.refuse(unless)
	last := g.holds == h
	g.gateMu.Unlock()
	if err != nil {
		return err
	}
	if last {
		lastCall()
	}
	g.gateMu.Lock()
	defer g.gateMu.Unlock()
	g.holds &^= h
	g.reopen()
	return g.refuse(0)
}

// reopen lets the vCPUs go on if nothing keeps them. gateMu is held.
func (g *gate) reopen() {
	g.closed.Store(g.holds != 0 || g.rests != 0 || g.ended)
	if g.holds == 0 && g.rests == 0 {
		g.opened.Broadcast()
	}
}

// rest keeps vCPUs out of the guest until unrest; it does not wait for them.
func (g *gate) rest() {
	g.gateMu.Lock()
	defer g.gateMu.Unlock()
	g.rests++
	g.closed.Store(true)
	g.kick()
}

// flush gets every vCPU out of the guest once, and waits for that at most as long as
// patience. It is a rest that ends when all of them have come.
func (g *gate) flush(patience time.Duration) {
	g.gateMu.Lock()
	defer g.gateMu.Unlock()
	if g.parked == g.live {
		return
	}
	late := false
	timer := time.AfterFunc(patience, func() {
		g.gateMu.Lock()
		defer g.gateMu.Unlock()
		late = true
		g.stopped.Broadcast()
	})
	defer timer.Stop()
	g.rests++
	g.closed.Store(true)
	g.kick()
	for g.parked < g.live && !g.ended && !late {
		g.stopped.Wait()
	}
	g.rests--
	g.reopen()
}

func (g *gate) unrest() {
	g.gateMu.Lock()
	defer g.gateMu.Unlock()
	g.rests--
	g.reopen()
}

// refuse reports why nothing can be held or released. gateMu is held.
func (g *gate) refuse(unless hold) error {
	switch {
	case g.ended:
		return errEnded
	case g.holds&unless != 0:
		return ErrHandoff
	}
	return nil
}

// check fails as hold does, and holds nothing.
func (g *gate) check(unless hold) error {
	g.gateMu.Lock()
	defer g.gateMu.Unlock()
	return g.refuse(unless)
}

// held returns the holds there are.
func (g *gate) held() hold {
	g.gateMu.Lock()
	defer g.gateMu.Unlock()
	return g.holds
}

// end makes every vCPU leave, and everybody who waits for one to park.
func (g *gate) end() {
	g.gateMu.Lock()
	defer g.gateMu.Unlock()
	g.ended = true
	g.closed.Store(true)
	g.kick()
	g.opened.Broadcast()
	g.stopped.Broadcast()
}

// join waits for the holds and releases under way, which an end cuts short.
// Later ones do nothing.
func (g *gate) join() {
	g.turnMu.Lock()
	defer g.turnMu.Unlock()
}

// kick gets every vCPU out of the guest. gateMu is held.
func (g *gate) kick() {
	for _, v := range g.vcpus {
		// The signal fails only for a thread that is gone.
		_ = v.Kick()
	}
}

// enter and leave count the goroutines of vCPUs.
func (g *gate) enter() { g.count(1) }
func (g *gate) leave() { g.count(-1) }

func (g *gate) count(n int) {
	g.gateMu.Lock()
	defer g.gateMu.Unlock()
	g.live += n
	if g.parked == g.live {
		g.stopped.Broadcast()
	}
}
