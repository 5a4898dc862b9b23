package migrate

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
)

// restless is a source whose guest resets itself.
type restless struct {
	*toySource
	pausing func() // called when the guest is stopped

	resetMu sync.Mutex // guards the fields below
	asked   chan struct{}
	resets  int // made here
	resetOK error
	after   int // the guest asks again at once, so often
}

func newRestless(t testing.TB, runs *whoRuns) *restless {
	return &restless{toySource: newToySource(t, runs), asked: make(chan struct{})}
}

func (r *restless) ask() {
	r.resetMu.Lock()
	defer r.resetMu.Unlock()
	if !isClosed(r.asked) {
		close(r.asked)
	}
}

func (r *restless) ResetRequested() <-chan struct{} {
	r.resetMu.Lock()
	defer r.resetMu.Unlock()
	return r.asked
}

func (r *restless) Reset(context.Context) error {
	r.resetMu.Lock()
	defer r.resetMu.Unlock()
	if r.resetOK != nil {
		return r.resetOK
	}
	r.runs.take("source")
	r.runs.set("source", true)
	r.resets++
	r.asked = make(chan struct{})
	if r.after--; r.after >= 0 {
		close(r.asked)
	}
	return nil
}

func (r *restless) made() int {
	r.resetMu.Lock()
	defer r.resetMu.Unlock()
	return r.resets
}

func (r *restless) PauseForHandoff(ctx context.Context) (bool, error) {
	if r.pausing != nil {
		r.pausing()
	}
	return r.toySource.PauseForHandoff(ctx)
}

func (r *restless) SaveState(ctx context.Context) ([]byte, error) {
	if isClosed(r.ResetRequested()) {
		return []byte("reset"), nil
	}
	return r.toySource.SaveState(ctx)
}

// TestAResetInTheStop: the guest asks for its reset in the very moment in which it is
// stopped, each time. It arrives with that, and nothing of its last pages.
func TestAResetInTheStop(t *testing.T) {
	for _, opt := range []Options{{}, {VerifyPages: true}, {MaxRounds: 1, DowntimeLimit: time.Millisecond}} {
		rig := newRigOf(t, patienceOfTests, 70*mempage.Size)
		src := newRestless(t, rig.runs)
		src.pausing = src.ask
		opt.PeerTimeout = patienceOfTests
		r, err := New(src, rig.addr, opt).Run(t.Context())
		if err != nil || r.GuestResets != 1 || src.made() != 0 || !rig.runs.is("destination") || r.StopsUndone != 0 {
			t.Errorf("%+v, %v, %d resets here", r, err, src.made())
		}
		rig.end()
		if got := string(rig.target().loaded); got != "reset" {
			t.Errorf("the destination loaded %q", got)
		}
	}
}

// TestResetsBeforeTheFirstPage: a guest that resets itself while the destination is built
// does not wait for that.
func TestResetsBeforeTheFirstPage(t *testing.T) {
	rig := newRigOf(t, patienceOfTests, 70*mempage.Size)
	src := newRestless(t, rig.runs)
	rig.eachStep(func(s string) error {
		if s == "build" {
			src.after = 2
			src.ask()
			for src.made() < 3 {
				time.Sleep(time.Millisecond)
			}
		}
		return nil
	})
	r, err := New(src, rig.addr, Options{PeerTimeout: patienceOfTests}).Run(t.Context())
	if err != nil || r.GuestResets != 3 || r.PagesSent == 0 {
		t.Errorf("%+v, %v", r, err)
	}
	rig.end()
	if got := string(rig.target().loaded); got != "state" {
		t.Errorf("the destination loaded %q", got)
	}
}

// TestAResetAtEveryFrame: whatever frame is under way when the guest resets itself, the
// migration completes.
func TestAResetAtEveryFrame(t *testing.T) {
	for _, typ := range []frameType{frameConfig, framePages, frameRound, frameState, frameCommit, frameHelloOK, frameReady, framePrepared, frameRunning} {
		f := fault{typ: typ, toSource: typ >= frameHelloOK, pass: true}
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			rig := newRigOf(t, patienceOfTests, 70*mempage.Size)
			src := newRestless(t, rig.runs)
			proxy := startProxy(t, rig.addr, f, func() {
				if rig.runs.is("source") { // a guest that is stopped asks for nothing
					src.ask()
				}
			})
			r, err := New(src, proxy.ln.Addr().String(), Options{PeerTimeout: patienceOfTests}).Run(t.Context())
			if err != nil || r.GuestResets > 1 || rig.runs.is("source") || !rig.runs.is("destination") {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
}

// sooner makes the patience of a migration with a reset end when the channel says so.
func sooner(m *Migration) chan<- time.Time {
	end := make(chan time.Time)
	real := m.clock.after
	m.clock.after = func(d time.Duration) <-chan time.Time {
		if d == resetPatience {
			return end
		}
		return real(d)
	}
	return end
}

// TestAResetThatCannotWait: a destination that takes too long does not keep the guest
// from its reset. The migration begins anew, even while the destination is still at the
// last session, and what was sent counts.
func TestAResetThatCannotWait(t *testing.T) {
	rig := newRigOf(t, patienceOfTests, 70*mempage.Size)
	src := newRestless(t, rig.runs)
	src.pausing = func() {
		if src.made() == 0 {
			src.ask()
		}
	}
	m := New(src, rig.addr, Options{PeerTimeout: patienceOfTests})
	end := sooner(m)
	rig.eachStep(func(s string) error {
		if s == "load" && src.made() == 0 {
			end <- time.Time{}
			for src.made() == 0 {
				time.Sleep(time.Millisecond)
			}
		}
		return nil
	})
	r, err := m.Run(t.Context())
	if err != nil || src.made() != 1 || r.GuestResets != 2 || len(r.Rounds) < 4 || r.PagesSent < 138 || r.BytesSent < r.PagesSent*mempage.Size {
		t.Errorf("%+v, %v, %d resets here", r, err, src.made())
	}
	rig.end()
	if got := string(rig.target().loaded); got != "state" || rig.runs.is("source") {
		t.Errorf("the destination loaded %q", got)
	}
}

// TestADestinationThatKnowsNoResets: the guest is reset at the source, and the migration
// begins anew, but not for ever.
func TestADestinationThatKnowsNoResets(t *testing.T) {
	for name, c := range map[string]struct {
		resets int
		says   string
		fails  error
	}{
		"once":     {resets: 1},
		"for ever": {resets: 1000, says: "has begun anew 10 times"},
		"fails":    {resets: 1, fails: errors.New("no memory for it"), says: "reset the guest: no memory for it"},
	} {
		t.Run(name, func(t *testing.T) {
			runs := &whoRuns{t: t, who: map[string]bool{}}
			src := newRestless(t, runs)
			src.resetOK = c.fails
			src.pausing = func() {
				if src.made() < c.resets {
					src.ask()
				}
			}
			var dst *toyTarget
			r := NewReceiver(buildFunc(func(context.Context, []byte) (Target, error) {
				dst = &toyTarget{heapTarget: heapTarget{t: t, mem: [2][]byte{make([]byte, 70*mempage.Size), make([]byte, 66*mempage.Size)}}, runs: runs}
				return dst, nil
			}), nil)
			r.known = []string{featureVerifyPages}
			err := moveTo(r, New(src, "the other host", Options{PeerTimeout: patienceOfTests}))
			if c.says == "" {
				if err != nil || string(dst.loaded) != "state" || src.made() != 1 {
					t.Errorf("%v, %d resets here, loaded %q", err, src.made(), dst.loaded)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.says) || runs.is("destination") {
				t.Errorf("%v", err)
			}
		})
	}
}
