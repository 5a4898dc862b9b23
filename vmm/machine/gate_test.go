package machine

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fakeVCPU is a vCPU whose Run does what the test says.
type fakeVCPU struct {
	kickMu sync.Mutex // guards flag
	kicked *sync.Cond
	flag   bool
}

func newFakeVCPU() *fakeVCPU {
	v := &fakeVCPU{}
	v.kicked = sync.NewCond(&v.kickMu)
	return v
}

func (v *fakeVCPU) Kick() error {
	v.SetImmediateExit(true)
	return nil
}

func (v *fakeVCPU) SetImmediateExit(on bool) {
	v.kickMu.Lock()
	defer v.kickMu.Unlock()
	v.flag = on
	v.kicked.Broadcast()
}

func (v *fakeVCPU) immediate() bool {
	v.kickMu.Lock()
	defer v.kickMu.Unlock()
	return v.flag
}

// untilKicked is a guest that runs forever.
func (v *fakeVCPU) untilKicked() {
	v.kickMu.Lock()
	defer v.kickMu.Unlock()
	for !v.flag {
		v.kicked.Wait()
	}
}

// TestGateDrains: a vCPU whose exit is not completed goes through a closed gate
// until the kernel has nothing left, with immediate exit set, and only then
// counts as stopped.
func TestGateDrains(t *testing.T) {
	g := newGate()
	v := newFakeVCPU()
	g.vcpus = append(g.vcpus, v)
	g.enter()
	started, again := make(chan struct{}), make(chan struct{})
	drained := 0
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer g.leave()
		if !g.admit(v, false, false) {
			t.Error("not admitted")
		}
		close(started)
		v.untilKicked()
		for range 3 { // three more exits of one string instruction
			if !g.admit(v, true, false) || !v.immediate() {
				t.Error("a vCPU with something to complete was not let through with immediate exit")
			}
			drained++
		}
		if !g.admit(v, false, true) || v.immediate() {
			t.Error("not let into the guest after the release")
		}
		close(again)
		v.untilKicked()
		if g.admit(v, true, false) {
			t.Error("admitted after the end")
		}
	}()
	check(t, g.release(holdStart, 0, func() {}))
	<-started
	if before, err := g.hold(t.Context(), holdUser, holdHandoff); before != 0 || err != nil || drained != 3 {
		t.Errorf("hold returned %v, %v after %d of 3 completions", before, err, drained)
	}
	if before, err := g.hold(t.Context(), holdHandoff, 0); before != holdUser || err != nil {
		t.Errorf("second hold: %v, %v", before, err)
	}
	if _, err := g.hold(t.Context(), holdUser, holdHandoff); !errors.Is(err, ErrHandoff) {
		t.Errorf("held by a user during a handoff: %v", err)
	}
	if err := g.release(holdUser, holdHandoff, func() {}); !errors.Is(err, ErrHandoff) {
		t.Errorf("released by a user during a handoff: %v", err)
	}
	called := false
	check(t, g.release(holdUser, 0, func() { called = true }))
	if called || g.held() != holdHandoff {
		t.Error("one of two holds was released, and the vCPUs were told to run")
	}
	check(t, g.release(holdHandoff, 0, func() { called = true }))
	if !called {
		t.Error("the last hold was released, and the vCPUs were not told to run")
	}
	<-again
	g.end()
	<-done
	if _, err := g.hold(t.Context(), holdUser, holdHandoff); !errors.Is(err, errEnded) {
		t.Errorf("an ended machine can be held: %v", err)
	}
	err := g.release(holdUser, holdHandoff, func() { t.Error("an ended machine was told to run") })
	if !errors.Is(err, errEnded) {
		t.Errorf("an ended machine can be released: %v", err)
	}
}

// TestGateHoldEnds: a hold whose context ends while a vCPU does not come holds
// nothing, and the other vCPUs go on. What was held before stays held.
func TestGateHoldEnds(t *testing.T) {
	g, runs := spinning(t, 2)
	awaitRuns(t, runs, 1)
	g.enter() // a vCPU that never comes
	for n := range int64(3) {
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Millisecond, errLate)
		before, err := g.hold(ctx, holdUser, holdHandoff)
		cancel()
		if before != 0 || !errors.Is(err, errLate) || !strings.Contains(err.Error(), "a vCPU does not leave the guest") {
			t.Errorf("hold: %v, %v", before, err)
		}
		if g.held() != 0 || g.closed.Load() {
			t.Fatal("the gate stays closed")
		}
		awaitRuns(t, runs, n+2) // each goes back into the guest
	}
	g.leave()
	_, err := g.hold(t.Context(), holdUser, 0)
	check(t, err)
	g.enter()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if before, err := g.hold(ended, holdHandoff, 0); before != holdUser || !errors.Is(err, context.Canceled) {
		t.Errorf("second hold: %v, %v", before, err)
	}
	if g.held() != holdUser || !g.closed.Load() {
		t.Error("a hold that failed has taken another away")
	}
	g.leave()
	// A context that has ended does not matter if nobody is waited for.
	if _, err := g.hold(ended, holdHandoff, 0); err != nil {
		t.Error(err)
	}
}

var errLate = errors.New("too late")

// TestGateStorm runs holds, releases and vCPUs at the same time. During a hold no vCPU
// runs.
func TestGateStorm(t *testing.T) {
	g := newGate()
	const vcpus, rounds = 3, 2000
	var inside [vcpus]struct {
		sync.Mutex
		in bool
	}
	var threads sync.WaitGroup
	for i := range vcpus {
		v := newFakeVCPU()
		g.vcpus = append(g.vcpus, v)
		g.enter()
		threads.Go(func() {
			defer g.leave()
			pending, kicked := false, false
			for n := 0; g.admit(v, pending, kicked); n++ {
				if v.immediate() {
					pending, kicked = false, true
					continue
				}
				inside[i].Lock()
				inside[i].in = true
				inside[i].Unlock()
				if n%3 == 0 {
					v.untilKicked()
				}
				inside[i].Lock()
				inside[i].in = false
				inside[i].Unlock()
				pending, kicked = true, false
			}
		})
	}
	check(t, g.release(holdStart, 0, func() {}))
	var holders sync.WaitGroup
	for _, h := range []hold{holdUser, holdHandoff} {
		holders.Go(func() {
			for range rounds {
				if _, err := g.hold(t.Context(), h, 0); err != nil {
					t.Error(err)
				}
				for i := range inside {
					inside[i].Lock()
					if inside[i].in {
						t.Error("a vCPU runs in a held machine")
					}
					inside[i].Unlock()
				}
				if err := g.release(h, 0, func() {}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	holders.Wait()
	g.end()
	threads.Wait()
}

// TestGateDoesNotPoll: vCPUs that stand still do not wake up before the release.
func TestGateDoesNotPoll(t *testing.T) {
	m := newCounting(t)
	check(t, m.Pause(t.Context()))
	// Threads of Go's runtime and of the race detector wake up, too, the more the busier
	// the host is. Two vCPUs that poll switch about 100,000 times a second.
	for deadline := time.Now().Add(patience); ; {
		var before, after unix.Rusage
		check(t, unix.Getrusage(unix.RUSAGE_SELF, &before))
		time.Sleep(100 * time.Millisecond)
		check(t, unix.Getrusage(unix.RUSAGE_SELF, &after))
		n := after.Nvcsw - before.Nvcsw
		if n < 700 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d context switches in 100 ms of a paused machine, and never fewer than 700", n)
		}
	}
}
