package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
)

// whoRuns records which sides may run the guest. The handoff must exclude that both do at
// one moment.
type whoRuns struct {
	t   testing.TB
	mu  sync.Mutex
	who map[string]bool
	// disks is the side that holds the disks: the source until it yields.
	disks string
}

// take moves the disks; a side that starts without them is a failure too.
func (w *whoRuns) take(who string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.disks != "" && w.disks != who {
		w.t.Errorf("%s runs with the disks in the hands of the %s", who, w.disks)
	}
	w.disks = who
}

func (w *whoRuns) yield() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.disks = ""
}

func (w *whoRuns) set(who string, runs bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.who[who] = runs
	if w.who["source"] && w.who["destination"] {
		w.t.Errorf("both sides run the guest")
	}
}

func (w *whoRuns) is(who string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.who[who]
}

// toySource is a machine whose memory nobody writes.
type toySource struct {
	heapTarget
	runs    *whoRuns
	paused  bool // by its user
	pauseOK error
	saveOK  error
	yieldOK error
	stall   bool // the first yield does not come to an end by itself
}

func (s *toySource) SampleStorage(_ context.Context, session [16]byte) ([]byte, error) {
	return session[:], nil
}

func newToySource(t testing.TB, runs *whoRuns) *toySource {
	s := &toySource{heapTarget: heapTarget{t: t, mem: [2][]byte{make([]byte, 70*mempage.Size), make([]byte, 66*mempage.Size)}}, runs: runs}
	for i := range s.mem[0] {
		s.mem[0][i] = byte(i / mempage.Size)
	}
	runs.set("source", true)
	runs.take("source")
	return s
}

func (s *toySource) StartDirtyLog() error { return nil }
func (s *toySource) StopDirtyLog() error  { return nil }
func (s *toySource) FetchDirtyLog(_ int, bm []uint64) error {
	clear(bm)
	return nil
}
func (s *toySource) ClearDirtyLog(int, uint64, uint64, []uint64) error { return nil }
func (s *toySource) ManualProtect() bool                               { return true }
func (s *toySource) FetchVMMDirty(int, func(int, uint64)) error        { return nil }
func (s *toySource) MigrationConfig() ([]byte, error)                  { return []byte("config"), nil }
func (s *toySource) Paused() bool                                      { return s.paused }
func (s *toySource) PrepareStop(context.Context) error                 { return nil }
func (s *toySource) PauseForHandoff(context.Context) (bool, error) {
	s.runs.set("source", false)
	return !s.paused, s.pauseOK
}
func (s *toySource) YieldForHandoff(ctx context.Context) error {
	if s.stall {
		s.stall = false
		<-ctx.Done()
		return context.Cause(ctx)
	}
	if s.yieldOK == nil {
		s.runs.yield()
	}
	return s.yieldOK
}
func (s *toySource) ResumeAfterAbort(context.Context) error {
	s.runs.take("source")
	s.runs.set("source", !s.paused)
	return nil
}
func (s *toySource) SaveState(context.Context) ([]byte, error) { return []byte("state"), s.saveOK }

// toyTarget records the right to run.
type toyTarget struct {
	heapTarget
	runs    *whoRuns
	startOK error
	paused  bool
	step    func(string) error // called at each step of its life; nil: not
}

func (d *toyTarget) at(step string) error {
	if d.step == nil {
		return nil
	}
	return d.step(step)
}

func (d *toyTarget) PrepareState(state []byte) error {
	return errors.Join(d.at("prepare"), d.heapTarget.PrepareState(state))
}

func (d *toyTarget) LoadState(ctx context.Context, state []byte) error {
	return errors.Join(d.at("load"), d.heapTarget.LoadState(ctx, state))
}

func (d *toyTarget) Discard() error {
	return errors.Join(d.at("discard"), d.heapTarget.Discard())
}

func (d *toyTarget) Start(ctx context.Context, paused bool) error {
	if err := d.at("start"); err != nil {
		return err
	}
	if d.startOK != nil {
		return d.startOK
	}
	d.paused = paused
	d.runs.take("destination")
	d.runs.set("destination", true)
	return d.heapTarget.Start(ctx, paused)
}

// lineHandler passes each record on as a line.
type lineHandler struct {
	slog.Handler
	lines chan<- string
}

func (lineHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h lineHandler) Handle(_ context.Context, r slog.Record) error {
	line := r.Message
	r.Attrs(func(a slog.Attr) bool {
		line += fmt.Sprintf(" %s=%v", a.Key, a.Value)
		return true
	})
	h.lines <- line
	return nil
}

func newLineLog(lines chan<- string) *slog.Logger {
	return slog.New(lineHandler{slog.DiscardHandler, lines})
}

// handoffRig is a source and a destination.
type handoffRig struct {
	runs    *whoRuns
	src     *toySource
	recv    *Receiver
	addr    string
	served  chan error
	stop    context.CancelFunc
	lines   chan string // what the destination says
	mu      sync.Mutex  // guards dst, startOK
	startOK error       // what Start of the next machine returns
	dst     *toyTarget
	step    func(string) error // of the next machine
}

// eachStep sets what the next machine calls at each step of its life.
func (r *handoffRig) eachStep(f func(string) error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.step = f
}

func (r *handoffRig) target() *toyTarget {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.dst
}

func newRig(t *testing.T) *handoffRig { return newRigOf(t, 300*time.Millisecond, 70*mempage.Size) }

// newRigOf is newRig with the destination's time-out, and the length of its first slot in
// bytes.
func newRigOf(t *testing.T, timeout time.Duration, slot0 int) *handoffRig {
	runs := &whoRuns{t: t, who: map[string]bool{}}
	rig := &handoffRig{runs: runs, src: newToySource(t, runs), served: make(chan error, 1), lines: make(chan string, 16)}
	rig.recv = NewReceiver(buildFunc(func(context.Context, []byte) (Target, error) {
		rig.mu.Lock()
		defer rig.mu.Unlock()
		rig.dst = &toyTarget{heapTarget: heapTarget{t: t, mem: [2][]byte{make([]byte, slot0), make([]byte, 66*mempage.Size)}}, runs: runs,
			startOK: rig.startOK, step: rig.step}
		return rig.dst, rig.dst.at("build")
	}), slog.New(lineHandler{slog.DiscardHandler, rig.lines}))
	rig.recv.timeout = timeout
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	rig.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	rig.stop = cancel
	go func() { rig.served <- rig.recv.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-rig.served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return rig
}

// end stops the receiver and waits for it.
func (r *handoffRig) end() {
	r.stop()
	err := <-r.served
	r.served <- err
}

func testOptions() Options { return Options{PeerTimeout: 300 * time.Millisecond} }

func TestHandoffCompletes(t *testing.T) {
	rig := newRig(t)
	opt := testOptions()
	opt.VerifyPages = true
	m := New(rig.src, rig.addr, opt)
	if _, err := m.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	<-rig.recv.Arrived()
	if rig.runs.is("source") || !rig.runs.is("destination") {
		t.Error("the guest did not change sides")
	}
	for i := range rig.src.mem {
		if string(rig.src.mem[i]) != string(rig.target().mem[i]) {
			t.Errorf("slot %d differs", i)
		}
	}
	r := m.Result()
	if r.Status != "completed" || r.PagesSent+r.PagesZero != 136 || r.Downtime <= 0 || r.RAMBytes != 136*mempage.Size || len(r.Rounds) != 2 {
		t.Errorf("result %+v", r)
	}
	if err := m.Cancel(); !errors.Is(err, ErrTooLate) {
		t.Errorf("cancel after completion: %v", err)
	}
	// A second guest is refused.
	rig.runs.set("destination", false)
	rig.runs.yield()
	rig.runs.set("source", true)
	if _, err := New(rig.src, rig.addr, testOptions()).Run(context.Background()); !errors.Is(err, ErrRefused) {
		t.Errorf("a second migration: %v", err)
	}
}

func TestPausedGuestArrivesPaused(t *testing.T) {
	rig := newRig(t)
	rig.src.paused = true
	if _, err := New(rig.src, rig.addr, testOptions()).Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	<-rig.recv.Arrived()
	if !rig.target().paused {
		t.Error("a paused guest was started")
	}
}

// The connection ends, or becomes silent, around every frame of the exchange. Both sides
// never run at one time, and in the end exactly one does.
func TestFaultAtEveryFrame(t *testing.T) {
	var faults []fault
	for _, typ := range []frameType{frameConfig, framePages, framePacked, frameRound, frameState, frameUndo, frameCommit,
		frameHelloOK, frameReady, framePrepared, frameRunning} {
		faults = append(faults, fault{toSource: typ >= frameHelloOK, typ: typ})
	}
	faults = append(faults, fault{typ: frameRound, toSource: true})
	for channel := range uint16(3) {
		faults = append(faults, fault{typ: frameRound, channel: channel + 1}, fault{typ: frameRound, channel: channel + 1, flags: flagLast})
	}
	for _, f := range faults {
		for _, f.after = range []bool{false, true} {
			for _, f.hang = range []bool{false, true} {
				t.Run(f.String(), func(t *testing.T) {
					t.Parallel()
					// On a busy machine a peer may time out before it reaches the
					// frame: then both get more time.
					for _, patience := range []time.Duration{300 * time.Millisecond, 3 * time.Second, 30 * time.Second} {
						if faultAt(t, f, patience) {
							return
						}
					}
					t.Error("the fault never struck")
				})
			}
		}
	}
}

// faultAt runs a migration with a fault, and checks which side runs afterwards. It returns
// false if the migration ended before the fault.
func faultAt(t *testing.T, f fault, patience time.Duration) (struck bool) {
	rig := newRigOf(t, patience, 70*mempage.Size)
	proxy := startProxy(t, rig.addr, f, func() {})
	opt := testOptions()
	opt.PeerTimeout, opt.Channels = patience, 3
	if f.typ == framePacked {
		opt.Compression = CompressLZ4
	}
	m := New(rig.src, proxy.ln.Addr().String(), opt)
	if f.typ == frameUndo {
		rig.src.stall, m.guard = true, guardTimes{least: 20 * time.Millisecond}
	}
	_, err := m.Run(context.Background())
	source, destination := rig.runs.is("source"), rig.runs.is("destination")
	if source == destination {
		t.Fatalf("source runs: %v, destination runs: %v (%v)", source, destination, err)
	}
	select {
	case <-proxy.struck:
	case <-time.After(2 * time.Second): // it may strike behind the last frame
		return false
	}
	if err != nil && strings.Contains(err.Error(), net.ErrClosed.Error()) {
		t.Errorf("the reason is what the end did, not why: %v", err)
	}
	if (err == nil) != destination {
		t.Errorf("the source was told %v, the destination runs: %v", err, destination)
	}
	if !m.Committed() && destination {
		t.Error("the destination runs and COMMIT was never sent")
	}
	if destination {
		<-rig.recv.Arrived()
	}
	return true
}

// A receiver that is stopped says so before its connections end: at each frame of the
// exchange the source learns at once who runs the guest.
func TestTheReceiverIsStoppedAtEveryFrame(t *testing.T) {
	faults := []fault{{typ: frameRound, toSource: true}, {typ: frameRound, flags: flagLast}, {typ: frameRound, channel: 2, flags: flagLast}}
	for _, typ := range []frameType{frameConfig, framePages, frameRound, frameState, frameCommit, frameHelloOK, frameReady, framePrepared, frameRunning} {
		faults = append(faults, fault{toSource: typ >= frameHelloOK, typ: typ})
	}
	for _, f := range faults {
		f.pass = true
		for _, f.after = range []bool{false, true} {
			t.Run(f.String(), func(t *testing.T) {
				t.Parallel()
				rig := newRigOf(t, patienceOfTests, 70*mempage.Size)
				proxy := startProxy(t, rig.addr, f, rig.stop)
				_, err := New(rig.src, proxy.ln.Addr().String(), Options{PeerTimeout: patienceOfTests, Channels: 2}).Run(t.Context())
				rig.settled(t, err)
			})
		}
	}
}

// settled expects that the receiver was stopped, and that the source knows who runs the
// guest.
func (r *handoffRig) settled(t *testing.T, err error) {
	t.Helper()
	r.end()
	source, destination := r.runs.is("source"), r.runs.is("destination")
	if errors.Is(err, ErrHandoffUnknown) || source == destination || (err == nil) != destination {
		t.Errorf("source runs: %v, destination runs: %v, %v", source, destination, err)
	}
	if err != nil && !strings.Contains(err.Error(), errEnding.Error()) {
		t.Errorf("the source does not know why: %v", err)
	}
	if d := r.target(); d != nil && d.discarded == destination {
		t.Errorf("discarded: %v, the destination runs: %v", d.discarded, destination)
	}
}

// TestTheReceiverIsStoppedAtEveryStep does so while the destination works.
func TestTheReceiverIsStoppedAtEveryStep(t *testing.T) {
	for _, step := range []string{"build", "prepare", "load", "start"} {
		t.Run(step, func(t *testing.T) {
			rig := newRigOf(t, patienceOfTests, 70*mempage.Size)
			rig.eachStep(func(s string) error {
				if s == step {
					rig.stop()
				}
				return nil
			})
			_, err := New(rig.src, rig.addr, Options{PeerTimeout: patienceOfTests}).Run(t.Context())
			rig.settled(t, err)
			if step == "start" && !rig.runs.is("destination") {
				t.Error("a guest that was being started does not run")
			}
		})
	}
}

// A source may try again as soon as it knows that its migration has failed, also while
// the destination still frees the machine.
func TestTheNextMigrationWaitsForTheLastOnesEnd(t *testing.T) {
	rig := newRigOf(t, patienceOfTests, 70*mempage.Size)
	freeing, freed := make(chan struct{}), make(chan struct{})
	rig.eachStep(func(s string) error {
		switch {
		case s == "load" && !isClosed(freeing):
			return openly("not today")
		case s == "discard":
			close(freeing)
			<-freed
		}
		return nil
	})
	if _, err := New(rig.src, rig.addr, Options{PeerTimeout: patienceOfTests}).Run(t.Context()); err == nil || !strings.Contains(err.Error(), "not today") {
		t.Fatalf("%v", err)
	}
	<-freeing
	second := make(chan error, 1)
	go func() {
		_, err := New(rig.src, rig.addr, Options{PeerTimeout: patienceOfTests}).Run(t.Context())
		second <- err
	}()
	select {
	case err := <-second:
		t.Errorf("it did not wait: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	close(freed)
	if err := <-second; err != nil {
		t.Error(err)
	}
}

// A destination that cannot start gives the right back.
func TestStartFailureReturnsTheRight(t *testing.T) {
	rig := newRig(t)
	rig.mu.Lock()
	rig.startOK = openly("its disk is locked")
	rig.mu.Unlock()
	m := New(rig.src, rig.addr, testOptions())
	_, err := m.Run(context.Background())
	if err == nil || !strings.Contains(err.Error(), "its disk is locked") {
		t.Fatalf("error %v", err)
	}
	if !rig.runs.is("source") || rig.runs.is("destination") {
		t.Error("the guest does not run at the source")
	}
	rig.end()
	if !rig.target().discarded {
		t.Error("the machine was not discarded")
	}
}

// A destination that has forgotten the session cannot answer, and the guest stays stopped
// at the source until it is taken back by force.
func TestUnknownSessionIsNotAborted(t *testing.T) {
	rig := newRig(t)
	// The destination loses its memory as the connection ends: another one is asked.
	proxy := startForgetfulProxy(t, rig.addr, newRig(t).addr, fault{typ: frameCommit}, func() {})
	m := New(rig.src, proxy.ln.Addr().String(), testOptions())
	ended := make(chan error, 1)
	go func() {
		_, err := m.Run(context.Background())
		ended <- err
	}()
	for deadline := time.Now().Add(20 * time.Second); !strings.Contains(m.Progress().Error, "does not know"); {
		select {
		case err := <-ended:
			t.Fatalf("the source settled on %v", err)
		case <-time.After(time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatalf("no answer: %+v", m.Progress())
		}
	}
	if rig.runs.is("source") {
		t.Error("the source runs without a verdict")
	}
	if p := m.Progress().Phase; p != PhaseHandoffUnknown {
		t.Errorf("phase %v", p)
	}
	if err := m.Cancel(); !errors.Is(err, ErrTooLate) {
		t.Errorf("cancel: %v", err)
	}
	m.Abandon()
	if err := <-ended; !errors.Is(err, ErrHandoffUnknown) {
		t.Errorf("run returned %v", err)
	}
	if rig.runs.is("source") {
		t.Error("the engine resumed the source by itself")
	}
}

// A cancel at a random moment succeeds before COMMIT and is refused afterwards.
func TestCancelAtAnyTime(t *testing.T) {
	for i := range 60 {
		rig := newRig(t)
		m := New(rig.src, rig.addr, testOptions())
		ended := make(chan error, 1)
		go func() {
			_, err := m.Run(context.Background())
			ended <- err
		}()
		time.Sleep(time.Duration(i) * 50 * time.Microsecond)
		cancelErr := m.Cancel()
		err := <-ended
		source, destination := rig.runs.is("source"), rig.runs.is("destination")
		switch {
		case source == destination:
			t.Fatalf("source runs: %v, destination runs: %v", source, destination)
		case cancelErr == nil && (!errors.Is(err, ErrCancelled) || !source):
			t.Fatalf("cancelled, but run returned %v and the source runs: %v", err, source)
		case cancelErr != nil && (err != nil || !destination):
			t.Fatalf("cancel refused (%v), but run returned %v", cancelErr, err)
		}
		if r := m.Result(); (r.Status == "cancelled") != (cancelErr == nil) {
			t.Fatalf("status %q after cancel returned %v", r.Status, cancelErr)
		}
		rig.stop()
	}
}

// The destination's log says why a migration ended.
func TestDestinationSaysWhy(t *testing.T) {
	rig := newRig(t)
	rig.src.saveOK = errors.New("the vCPU has no state")
	_, err := New(rig.src, rig.addr, testOptions()).Run(context.Background())
	if err == nil || !strings.Contains(err.Error(), "the vCPU has no state") {
		t.Fatal(err)
	}
	if line := <-rig.lines; !strings.Contains(line, "the vCPU has no state") || strings.Contains(line, "\n") {
		t.Errorf("the destination said %q", line)
	}
}

// timedTarget notes what it is told about the time of its state.
type timedTarget struct {
	*toyTarget
	after, prepared time.Time
}

func (d *timedTarget) SavedAfter(t time.Time) { d.after = t }

func (d *timedTarget) PrepareState(state []byte) error {
	d.prepared = time.Now()
	return d.toyTarget.PrepareState(state)
}

// A target learns a moment after which its state was saved: what this side said last
// before the source stopped the guest.
func TestATargetLearnsWhenItsStateWasSaved(t *testing.T) {
	runs := &whoRuns{t: t, who: map[string]bool{}}
	src := newRestless(t, runs) // its guest does not reset itself
	var paused time.Time
	src.pausing = func() { paused = time.Now() }
	dst := &timedTarget{toyTarget: &toyTarget{heapTarget: heapTarget{t: t, mem: [2][]byte{make([]byte, 70*mempage.Size), make([]byte, 66*mempage.Size)}}, runs: runs}}
	var built time.Time
	r := NewReceiver(buildFunc(func(context.Context, []byte) (Target, error) {
		built = time.Now()
		return dst, nil
	}), nil)
	if err := moveTo(r, New(src, "the other host", Options{})); err != nil {
		t.Fatal(err)
	}
	if dst.after.Before(built) || dst.after.After(paused) || dst.prepared.Before(paused) {
		t.Errorf("built %v, saved after %v, paused %v, prepared %v", built, dst.after, paused, dst.prepared)
	}
}
