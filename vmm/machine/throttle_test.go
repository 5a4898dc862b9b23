package machine

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/vmtest"
)

// spinning is a gate with vCPUs that run until they are kicked.
func spinning(t *testing.T, n int) (g *gate, runs []*atomic.Int64) {
	g = newGate()
	for range n {
		v, count := newFakeVCPU(), new(atomic.Int64)
		runs = append(runs, count)
		g.vcpus = append(g.vcpus, v)
		g.enter()
		go func() {
			defer g.leave()
			kicked := false
			for g.admit(v, false, kicked) {
				count.Add(1)
				v.untilKicked()
				kicked = true
			}
		}()
	}
	t.Cleanup(func() {
		g.throttle(0, 0)
		g.end()
	})
	check(t, g.release(holdStart, 0, func() {}))
	return g, runs
}

// awaitRuns waits until every vCPU has entered the guest n times.
func awaitRuns(t *testing.T, runs []*atomic.Int64, n int64) {
	t.Helper()
	for _, r := range runs {
		for began := time.Now(); r.Load() < n; time.Sleep(time.Millisecond) {
			if time.Since(began) > time.Minute {
				t.Fatalf("a vCPU entered the guest %d times, expected %d times", r.Load(), n)
			}
		}
	}
}

// TestThrottleTakesTurns: throttled vCPUs leave the guest and enter it again and again.
// The machine counts as running all the time.
func TestThrottleTakesTurns(t *testing.T) {
	g, runs := spinning(t, 2)
	g.throttle(time.Millisecond, time.Millisecond)
	awaitRuns(t, runs, 5)
	if h := g.held(); h != 0 {
		t.Errorf("a throttled machine is held: %v", h)
	}
	g.throttle(0, 0)
	g.gateMu.Lock()
	rests := g.rests
	g.gateMu.Unlock()
	if rests != 0 || g.closed.Load() {
		t.Errorf("after its end %d rests, closed: %v", rests, g.closed.Load())
	}
	// Nobody kicks any more: they stay in the guest.
	a, b := runs[0].Load(), runs[1].Load()
	time.Sleep(20 * time.Millisecond)
	if runs[0].Load() > a+1 || runs[1].Load() > b+1 {
		t.Error("vCPUs are kicked after the throttle's end")
	}
}

// TestThrottledMachinePausesAtOnce: a pause does not wait for the end of a rest, and the
// throttle does not wait for the end of a pause.
func TestThrottledMachinePausesAtOnce(t *testing.T) {
	g, runs := spinning(t, 2)
	g.throttle(time.Millisecond, time.Hour)
	for stopped := false; !stopped; time.Sleep(time.Millisecond) { // until the rest has begun
		g.gateMu.Lock()
		stopped = g.parked == 2
		g.gateMu.Unlock()
	}
	before, err := g.hold(t.Context(), holdUser, 0)
	if before != 0 || err != nil {
		t.Fatalf("hold: %v, %v", before, err)
	}
	told := false
	check(t, g.release(holdUser, 0, func() { told = true }))
	if !told {
		t.Error("the release of a throttled machine does not tell the vCPUs to run")
	}
	if _, err := g.hold(t.Context(), holdHandoff, 0); err != nil {
		t.Fatal(err)
	}
	n := runs[0].Load()
	g.throttle(0, 0) // the guest stands still, and goes on at full speed
	if runs[0].Load() != n {
		t.Error("the throttle's end let vCPUs of a held machine run")
	}
	check(t, g.release(holdHandoff, 0, func() {}))
	awaitRuns(t, runs, n+1)
}

// TestThrottledMachineEnds: the end of a machine ends the rest of its vCPUs.
func TestThrottledMachineEnds(t *testing.T) {
	g, runs := spinning(t, 1)
	g.throttle(time.Millisecond, time.Millisecond)
	awaitRuns(t, runs, 2)
	g.end()
	for live := 1; live > 0; time.Sleep(time.Millisecond) {
		g.gateMu.Lock()
		live = g.live
		g.gateMu.Unlock()
	}
	g.throttle(0, 0)
}

// TestThrottleARunningMachine: with real vCPUs, a throttled guest goes on, pauses at
// once and saves its state.
func TestThrottleARunningMachine(t *testing.T) {
	m := newCounting(t)
	check(t, m.Throttle(90))
	for _, bad := range []int{-1, 100} {
		if m.Throttle(bad) == nil {
			t.Errorf("%d%% was taken", bad)
		}
	}
	for range 3 {
		awaitChange(t, m, vmtest.CountAt, word(t, m, vmtest.CountAt))
		awaitChange(t, m, vmtest.APCountAt, word(t, m, vmtest.APCountAt))
	}
	if _, err := m.saveState(); err != ErrRunning {
		t.Errorf("the state of a throttled machine: %v", err)
	}
	for range 20 {
		src := m.Source()
		if _, err := src.PauseForHandoff(context.Background()); err != nil {
			t.Fatal(err)
		}
		if _, err := src.SaveState(vmtest.Within(t)); err != nil {
			t.Fatal(err)
		}
		check(t, src.ResumeAfterAbort(vmtest.Within(t)))
	}
	check(t, m.Throttle(0))
}
