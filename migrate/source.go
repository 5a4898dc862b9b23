package migrate

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/mempage"
)

// Migration is one outgoing migration: made by [New], driven by [Migration.Run].
type Migration struct {
	src  Source
	peer *dialer
	opt  Options

	clock    clock
	guard    guardTimes
	features []string // of the protocol, in use
	resets   resets
	disks    blockLog // to be copied, of the session under way
	offered  []Disk   // of which these are
	session  sessionID
	previous sessionID // given up for this one
	meter    meter
	done     chan struct{}
	ctx      context.Context // ends what happens before COMMIT
	cancel   context.CancelCauseFunc
	release  chan struct{} // closed by Abandon
	recover  chan struct{} // holds one: the destination is to be reached again now
	serveCtx context.Context

	handoffMu sync.Mutex // guards committed, released
	committed bool       // COMMIT may have left
	released  bool
	serves    bool // the guest runs at the destination, and may lack memory that is here
}

// New prepares to send src to the [Receiver] at address; nothing happens before Run.
// The address is host:port or unix:path, unless [Options.Dial] says otherwise.
func New(src Source, address string, opt Options) *Migration {
	opt = opt.withDefaults()
	m := &Migration{src: src, peer: newDialer(address, opt), opt: opt, features: opt.features(), clock: realClock, guard: realGuard,
		done: make(chan struct{}), release: make(chan struct{}), recover: make(chan struct{}, 1)}
	m.ctx, m.cancel = context.WithCancelCause(context.Background())
	m.meter.progress = Progress{Phase: PhaseConnecting, Address: address, ID: opt.ID}
	m.meter.result.ID, m.meter.notify = opt.ID, opt.Notify
	return m
}

// Run migrates, once. After nil the guest runs at the destination, and must never
// run here again. After any error except [ErrHandoffUnknown] it is as before, here.
// That one is returned only if ctx ends, or [Migration.Abandon] is called, while
// the verdict is unknown; the guest is left stopped.
func (m *Migration) Run(ctx context.Context) (Result, error) {
	defer close(m.done)
	stop := context.AfterFunc(ctx, func() { m.cancel(context.Cause(ctx)) })
	defer stop()
	pre, end := context.WithTimeoutCause(m.ctx, m.opt.Timeout,
		fmt.Errorf("%w after %v; the guest goes on here", ErrTimeout, m.opt.Timeout))
	defer end()

	var ended context.CancelFunc
	m.serveCtx, ended = context.WithCancel(context.WithoutCancel(ctx))
	defer ended()

	m.meter.update(func(mt *meter) { mt.started = time.Now() })
	err := m.opt.Validate()
	if _, ok := m.src.(Throttler); err == nil && m.opt.AutoConverge && !ok {
		err = errors.New("auto-converge: this machine cannot be slowed down")
	}
	if err != nil {
		err = wrongOptions{err}
	}
	if err == nil {
		err = m.attempts(pre, ctx)
		m.resets = resets{} // it leads to all that a session had
		if err != nil {
			debug.FreeOSMemory() // bitmaps and compressors: the guest goes on here, and does not need them
		}
	}
	phase := PhaseCompleted
	switch {
	case errors.Is(err, ErrCancelled):
		phase = PhaseCancelled
	case err != nil:
		phase = PhaseFailed
	}
	m.meter.finish(phase, err)
	return m.Result(), err
}

// Done is closed when Run has returned.
func (m *Migration) Done() <-chan struct{} { return m.done }

// Progress returns a snapshot. All methods except Run may be called at any time.
func (m *Migration) Progress() Progress { return m.meter.snapshot() }

// Result returns what has been measured so far; Status is empty until Run returns.
func (m *Migration) Result() Result { return m.meter.snapshotResult() }

// Cancel ends the migration: Run returns [ErrCancelled], and the guest goes on here.
// It fails with [ErrTooLate] once COMMIT may have left.
func (m *Migration) Cancel() error {
	m.handoffMu.Lock()
	defer m.handoffMu.Unlock()
	if m.committed {
		return ErrTooLate
	}
	m.cancel(ErrCancelled)
	return nil
}

// Committed reports whether the destination may have the right to run.
func (m *Migration) Committed() bool {
	m.handoffMu.Lock()
	defer m.handoffMu.Unlock()
	return m.committed
}

// Abandon ends the wait for a verdict, since an operator has decided who runs the
// guest: Run returns [ErrHandoffUnknown].
func (m *Migration) Abandon() {
	m.handoffMu.Lock()
	defer m.handoffMu.Unlock()
	if !m.released {
		m.released = true
		close(m.release)
	}
}

// commit is the point of no return: after it the guest may be resumed here only if
// the destination says that it does not run it.
func (m *Migration) commit(ctx context.Context) error {
	m.handoffMu.Lock()
	defer m.handoffMu.Unlock()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	m.committed = true
	return nil
}

func (m *Migration) setPhase(p Phase) {
	m.meter.update(func(mt *meter) {
		mt.progress.Phase = p
		mt.tell(Notice{Phase: p})
	})
}

// run is the whole exchange. pre bounds what precedes COMMIT, base what follows.
func (m *Migration) run(pre, base context.Context) (err error) {
	l, err := m.connect(pre)
	if err != nil {
		return err
	}
	defer l.close()
	if m.opt.SharedMemory {
		return m.handOverShared(base, l)
	}
	if err := m.setup(l.ctx, l); err != nil {
		return l.end(err)
	}

	disks, err := m.copyDisks(l)
	defer disks.end()
	if err != nil {
		return l.end(err)
	}
	m.setPhase(PhasePrecopy)
	p, err := m.track(l, disks)
	if err != nil {
		return l.end(err)
	}
	defer p.flush.end()
	m.meter.update(func(mt *meter) { mt.result.Setup = time.Since(mt.started) })

	if err = p.converge(l.ctx); err != nil {
		// First the guest, then the peer.
		err = l.explain(err)
		return l.end(errors.Join(err, m.takeBack(base, p)))
	}
	if m.opt.Snapshot != nil {
		return m.keep(base, p)
	}
	return m.handOver(base, p)
}

// copyDisks copies the disks that the destination needs, while the guest runs and may be
// reset. What it writes from now on is recorded.
func (m *Migration) copyDisks(l *link) (*diskCopy, error) {
	d, err := newDiskCopy(l, m.disks, &m.meter, m.opt)
	if d == nil || err != nil {
		return nil, err
	}
	m.setPhase(PhaseDisks)
	return d, d.first(l.ctx)
}

// track turns the dirty log on. From now on the guest is not reset here.
func (m *Migration) track(l *link, disks *diskCopy) (*precopy, error) {
	m.resets.resetMu.Lock()
	defer m.resets.resetMu.Unlock()
	tracker, err := newTracker(m.src.Slots(), m.src, m.opt.ClearBitmapShift)
	if err != nil {
		return nil, err
	}
	if err := tracker.Start(); err != nil {
		// Some slots may be logging already.
		return nil, errors.Join(err, tracker.Stop())
	}
	p, err := newPrecopy(m, l, tracker)
	if err != nil {
		return nil, errors.Join(err, tracker.Stop())
	}
	if p.disks = disks; disks != nil {
		disks.halted = &p.sender.halted
	}
	p.hints = newHinter(m, tracker)
	p.hints.carried = p.carried
	m.resets.precopy = p
	return p, nil
}

// takeBack lets the guest go on at the source, whether or not ctx has ended.
func (m *Migration) takeBack(ctx context.Context, p *precopy) error {
	err := p.release()
	p.serving.close()
	if p.stopped {
		err = errors.Join(err, p.resume(ctx))
	}
	p.hints.finish(true)
	return errors.Join(err, p.tracker.Stop())
}

// connect dials, says hello and opens the data channels.
func (m *Migration) connect(ctx context.Context) (*link, error) {
	var err error
	if m.session, err = newSessionID(); err != nil {
		return nil, err
	}
	h := newHello(purposeMigrate, m.session)
	h.dataChannels, h.alive, h.previous = uint16(m.opt.Channels), aliveInterval(m.opt.PeerTimeout), m.previous
	c, err := m.peer.connect(ctx, h)
	if err != nil {
		return nil, err
	}
	l := newLink(ctx, c, m.opt.PeerTimeout)
	m.meter.onWire(c.flow.sent.Load)
	asked := time.Now()
	r, err := l.awaitWithin(l.ctx, frameHelloOK, startPatience*m.opt.PeerTimeout)
	if err != nil {
		return nil, l.end(err)
	}
	l.rtt = time.Since(asked)
	var ok helloOK
	if err := decodeControl(r.typ, r.payload, &ok); err != nil {
		return nil, l.end(err)
	}
	if ok.Version != Version {
		return nil, l.end(fmt.Errorf("%w: the destination chose version %d", ErrProtocol, ok.Version))
	}
	l.pulse.beat(ok.Alive)
	m.compareStorage(ok.Features)
	if err := l.openChannels(m, ok); err != nil {
		return nil, l.end(err)
	}
	m.resets.known = slices.Contains(ok.Features, featureReset)
	m.meter.onWire(l.sent)
	m.meter.update(func(mt *meter) {
		mt.channels = l.channelBytes
		mt.progress.Channels, mt.result.Channels = len(l.data), len(l.data)
		mt.result.Compression = string(m.opt.Compression)
	})
	return l, nil
}

// setup sends the configuration and waits until the machine is built.
func (m *Migration) setup(ctx context.Context, l *link) error {
	m.resets.resetMu.Lock()
	msg, err := m.describe()
	m.resets.resetMu.Unlock()
	if err != nil {
		return err
	}
	return m.announce(ctx, l, msg)
}

// describe makes the configuration. resetMu is held.
func (m *Migration) describe() (msg configMsg, err error) {
	m.setPhase(PhaseSetup)
	msg = configMsg{Features: m.features}
	msg.Machine, err = m.src.MigrationConfig()
	if p, ok := m.src.(Previewer); ok && err == nil {
		msg.Preview, err = p.PreviewState()
	}
	m.disks, m.offered = nil, nil
	if s, ok := m.src.(DiskSource); ok && m.opt.CopyDisks {
		m.offered = s.Disks()
	}
	if err != nil {
		return msg, fmt.Errorf("describe the machine: %w", err)
	}
	var ram uint64
	for _, s := range m.src.Slots() {
		ram += s.Pages * mempage.Size
	}
	m.meter.update(func(mt *meter) { mt.progress.RAMBytes, mt.result.RAMBytes = ram, ram })
	return msg, nil
}

// announce sends the configuration and waits until the machine is built.
func (m *Migration) announce(ctx context.Context, l *link, msg configMsg) error {
	config, err := strictcbor.Marshal(msg)
	if err != nil {
		return fmt.Errorf("encode %v: %w", frameConfig, err)
	}
	if len(config) > maxConfig {
		return fmt.Errorf("the machine's configuration has %d bytes: must be at most %d", len(config), maxConfig)
	}
	if err := l.conn.writeFrame(header{typ: frameConfig}, config); err != nil {
		return err
	}
	r, err := l.await(ctx, frameReady)
	if err != nil || len(r.payload) == 0 {
		return err
	}
	m.disks, err = wanted(r, m.offered)
	return err
}
