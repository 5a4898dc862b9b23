package simtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/govmm/govmm/migrate"
)

// word is a [migrate.Referee] as two processes share it.
type word struct{ state atomic.Int32 }

func (w *word) TakeBack() bool { return w.state.CompareAndSwap(0, 2) }

// claim is what the destination does just before the guest runs.
func (w *word) claim() error {
	if !w.state.CompareAndSwap(0, 1) {
		return errors.New("the source has taken the guest back")
	}
	return nil
}

func sharedOptions(to place, w *word) migrate.Options {
	return migrate.Options{Dial: to.dial, SharedMemory: true, Referee: w}
}

// goesOn checks that the guest is where it should be, and goes on there.
func goesOn(t *testing.T, w *World, m *Machine) {
	t.Helper()
	if err := w.Err(); err != nil {
		t.Error(err)
	}
	if w.Holder() != m || !m.Running() {
		t.Fatalf("the guest does not run where it should")
	}
	before := m.Writes()
	for deadline := time.Now().Add(10 * time.Second); fmt.Sprint(before) == fmt.Sprint(m.Writes()); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the guest does not write")
		}
	}
}

// sharedSource makes a busy guest that runs.
func sharedSource(t *testing.T) (*World, *Machine) {
	w := newWorld(t)
	src, err := NewMachine(w, busyGuest(Layout{ManualProtect: true}))
	if err == nil {
		err = src.Resume()
	}
	if err != nil {
		t.Fatal(err)
	}
	return w, src
}

// TestSharedMemoryIsNotSent: the guest goes on in another machine around the same memory,
// several times, without a round.
func TestSharedMemoryIsNotSent(t *testing.T) {
	w, m := sharedSource(t)
	for range 20 {
		referee := &word{}
		b := &Sharing{Builder{World: w, Steps: Steps{Start: referee.claim}}}
		to, r := sharedReceiver(t, b)
		res, err := migrate.New(m, to.addr, sharedOptions(to, referee)).Run(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		m = (<-r.Arrived()).(*sharedTarget).Machine
		goesOn(t, w, m)
		if res.PagesSent+res.PagesZero+res.PagesHole != 0 || len(res.Rounds) != 0 || res.BytesSent > 1<<20 {
			t.Errorf("something was sent: %+v", res)
		}
		if res.Downtime <= 0 {
			t.Errorf("no downtime: %+v", res)
		}
	}
}

// sharedReceiver is receiverOver for a builder that shares.
func sharedReceiver(t *testing.T, b migrate.Builder) (place, *migrate.Receiver) {
	t.Helper()
	ln, d := transports[0].listen(t)
	ctx, cancel := context.WithCancel(context.Background())
	r := migrate.NewReceiver(b, nil)
	served := make(chan error, 1)
	go func() { served <- r.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		<-served
	})
	return place{addr: ln.Addr().String(), dial: d}, r
}

// TestSharedMemoryNeedsADestinationThatKnowsIt: another one refuses by name, and the guest
// has not stood still.
func TestSharedMemoryNeedsADestinationThatKnowsIt(t *testing.T) {
	w, m := sharedSource(t)
	to, _ := sharedReceiver(t, &Builder{World: w})
	m.Steps.Pause = func(context.Context) error { t.Error("the guest was stopped"); return nil }
	_, err := migrate.New(m, to.addr, sharedOptions(to, &word{})).Run(context.Background())
	if !errors.Is(err, migrate.ErrRefused) || !strings.Contains(err.Error(), "shared-memory") {
		t.Errorf("expected a refusal that names the feature, found %v", err)
	}
	m.Steps.Pause = nil
	goesOn(t, w, m)
}

// TestSharedMemoryFailsAtEachStep: the guest goes on at the source, in its memory, and the
// next attempt succeeds.
func TestSharedMemoryFailsAtEachStep(t *testing.T) {
	oops := errors.New("it does not work")
	for _, c := range []struct {
		step string
		src  Steps
		dst  func(*word) Steps
	}{
		{step: "config", src: Steps{Config: func() error { return oops }}},
		{step: "flush", src: Steps{Flush: func(context.Context) error { return oops }}},
		{step: "pause", src: Steps{Pause: func(context.Context) error { return oops }}},
		{step: "save", src: Steps{Save: func() error { return oops }}},
		{step: "prepare", dst: func(*word) Steps { return Steps{Prepare: func() error { return oops }} }},
		{step: "load", dst: func(*word) Steps { return Steps{Load: func() error { return oops }} }},
		{step: "yield", src: Steps{Yield: func() error { return oops }}},
		{step: "start", dst: func(*word) Steps { return Steps{Start: func() error { return oops }} }},
		{step: "claim", dst: func(w *word) Steps {
			return Steps{Start: func() error { w.TakeBack(); return w.claim() }}
		}},
	} {
		t.Run(c.step, func(t *testing.T) {
			w, m := sharedSource(t)
			referee := &word{}
			b := &Sharing{Builder{World: w}}
			if c.dst != nil {
				b.Steps = c.dst(referee)
			}
			to, _ := sharedReceiver(t, b)
			m.Steps = c.src
			if _, err := migrate.New(m, to.addr, sharedOptions(to, referee)).Run(context.Background()); err == nil {
				t.Fatal("no error")
			}
			goesOn(t, w, m)
			m.Steps = Steps{}
			to, r := sharedReceiver(t, &Sharing{Builder{World: w}})
			if _, err := migrate.New(m, to.addr, sharedOptions(to, &word{})).Run(context.Background()); err != nil {
				t.Fatalf("the next attempt: %v", err)
			}
			goesOn(t, w, (<-r.Arrived()).(*sharedTarget).Machine)
		})
	}
}

// TestSharedMemoryPeerDies: the destination's connections break at each of its steps. Where
// it had not claimed the guest, the source goes on; where it had, the source does not.
func TestSharedMemoryPeerDies(t *testing.T) {
	for _, step := range []string{"build", "prepare", "load", "before the claim", "after the claim"} {
		t.Run(step, func(t *testing.T) {
			w, m := sharedSource(t)
			referee := &word{}
			var conns struct {
				sync.Mutex
				all []net.Conn
			}
			die := func() {
				conns.Lock()
				defer conns.Unlock()
				for _, c := range conns.all {
					c.Close()
				}
			}
			hang := make(chan struct{})
			dead := func() error { // it says nothing any more, as a process that was killed
				die()
				<-hang
				return errors.New("dead")
			}
			b := &Sharing{Builder{World: w}}
			switch step {
			case "build":
				m.Steps.Flush = func(context.Context) error { die(); return nil }
			case "prepare":
				b.Steps.Prepare = dead
			case "load":
				b.Steps.Load = dead
			case "before the claim":
				b.Steps.Start = dead
			case "after the claim":
				b.Steps.Start = func() error {
					if err := referee.claim(); err != nil {
						return err
					}
					return dead()
				}
			}
			to, _ := sharedReceiver(t, b)
			t.Cleanup(func() { close(hang) })
			opt := sharedOptions(to, referee)
			opt.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
				c, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
				if err == nil {
					conns.Lock()
					conns.all = append(conns.all, c)
					conns.Unlock()
				}
				return c, err
			}
			_, err := migrate.New(m, to.addr, opt).Run(context.Background())
			if step == "after the claim" {
				if err != nil || m.Running() {
					t.Fatalf("the destination has the guest: err %v, the source runs it: %v", err, m.Running())
				}
				return
			}
			if err == nil {
				t.Fatal("no error")
			}
			goesOn(t, w, m)
		})
	}
}

// TestSharedMemoryStopIsBounded: a destination that does not load does not keep the guest.
func TestSharedMemoryStopIsBounded(t *testing.T) {
	w, m := sharedSource(t)
	hang := make(chan struct{})
	to, _ := sharedReceiver(t, &Sharing{Builder{World: w, Steps: Steps{Load: func() error { <-hang; return nil }}}})
	t.Cleanup(func() { close(hang) })
	opt := sharedOptions(to, &word{})
	opt.DowntimeLimit = time.Millisecond
	_, err := migrate.New(m, to.addr, opt).Run(context.Background())
	if err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("expected a stop that took too long, found %v", err)
	}
	goesOn(t, w, m)
}
