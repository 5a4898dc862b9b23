package main

import (
	"context"
	"path/filepath"
	"sync"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
)

// fakeVM is a VM behind the API, without a machine.
type fakeVM struct {
	mu        sync.Mutex // guards all below
	info      vmm.Info
	mig       *fakeMigration
	to        string
	opt       migrate.Options
	force     bool
	elsewhere bool   // it may run there: Resume needs force
	onEnd     func() // what a process does once its VM was stopped
	// What the power button does: an error, or the state in which the VM ends.
	deaf     error
	obeys    vmm.State
	ended    chan struct{}         // not guarded: made by serve
	records  []vmm.MigrationRecord // these three are not guarded: set before the server serves
	events   []vmm.Event
	check    migrate.CheckResult
	stats    vmm.Stats
	standing chan struct{}
	slow     time.Duration // what measuring and powering off takes
}

// serve answers for a VM in the CLI's runtime directory until the test ends or
// the VM is stopped.
func (c *cli) serve(name string, vm *fakeVM) {
	c.t.Helper()
	claim, err := api.ClaimName(filepath.Join(c.dir, "govmm"), name)
	if err != nil {
		c.t.Fatal(err)
	}
	ln, err := claim.Listen()
	if err != nil {
		c.t.Fatal(err)
	}
	vm.info.Name = claim.Name()
	if vm.info.State == "" {
		vm.info.State, vm.info.PID, vm.info.CPUs, vm.info.Memory = vmm.StateRunning, 4711, 2, 512<<20
	}
	vm.ended = make(chan struct{})
	server := api.NewServer(vm, claim.Socket())
	served := make(chan error, 1)
	var once sync.Once
	stop := func() {
		once.Do(func() {
			server.Shutdown()
			if err := <-served; err != nil {
				c.t.Error(err)
			}
			claim.Release()
		})
	}
	vm.onEnd = stop
	go func() { served <- server.Serve(ln) }()
	c.t.Cleanup(stop)
}

func (f *fakeVM) set(state vmm.State) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.info.State = state
	return nil
}

func (f *fakeVM) Info() vmm.Info {
	f.mu.Lock()
	defer f.mu.Unlock()
	info := f.info
	if f.mig != nil {
		p := f.mig.Progress()
		info.Migration = &p
	}
	return info
}
func (f *fakeVM) Pause(context.Context) error { return f.set(vmm.StatePaused) }

// PowerOff is heard by a guest that listens, and obeyed by one that obeys.
func (f *fakeVM) PowerOff(context.Context) error {
	time.Sleep(f.slow)
	f.mu.Lock()
	deaf, ends := f.deaf, f.obeys
	f.mu.Unlock()
	if deaf != nil {
		return deaf
	}
	if ends != "" {
		_ = f.set(ends)
		close(f.ended)
		go f.onEnd()
	}
	return nil
}

func (f *fakeVM) Ended() <-chan struct{} { return f.ended }

func (f *fakeVM) Balloon(context.Context) (balloon.Info, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if b, ok := f.info.Devices.Of("balloon").(*balloon.Info); ok {
		return *b, nil
	}
	return balloon.Info{}, kind.State("%w", vmm.ErrNoBalloon)
}

func (f *fakeVM) SetBalloon(_ context.Context, target uint64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if b, ok := f.info.Devices.Of("balloon").(*balloon.Info); ok {
		b.Target = target
		return nil
	}
	return kind.State("%w", vmm.ErrNoBalloon)
}

func (f *fakeVM) Stop(context.Context) error {
	go f.onEnd()
	return f.set(vmm.StateStopped)
}

func (f *fakeVM) Resume(_ context.Context, force bool) error {
	f.mu.Lock()
	f.force = force
	elsewhere := f.elsewhere
	f.mu.Unlock()
	if elsewhere && !force {
		return kind.State("%w: resume it at h:1", vmm.ErrMayRunElsewhere)
	}
	return f.set(vmm.StateRunning)
}

func (f *fakeVM) StartMigration(to string, opt migrate.Options) (*fakeMigration, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.to, f.opt = to, opt
	if f.mig == nil {
		f.mig = newFakeMigration()
	}
	close(f.mig.started)
	go func(m *fakeMigration, end func()) {
		if <-m.done; m.Result().Status == "completed" {
			end() // as the process does whose guest has moved away
		}
	}(f.mig, f.onEnd)
	return f.mig, nil
}

func (f *fakeVM) Migration() *fakeMigration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mig
}

// fakeMigration goes on until the test, or a cancel, ends it.
type fakeMigration struct {
	started chan struct{}
	done    chan struct{}
	mu      sync.Mutex // guards all below
	p       migrate.Progress
	res     migrate.Result
	late    error // what Cancel answers
}

func newFakeMigration() *fakeMigration {
	return &fakeMigration{
		started: make(chan struct{}), done: make(chan struct{}),
		p: migrate.Progress{Phase: migrate.PhasePrecopy, Round: 2, Address: "h:1", BytesSent: 12345},
	}
}

func (m *fakeMigration) end(status, why string) {
	m.mu.Lock()
	m.res = migrate.Result{Status: status, Error: why, Total: 1500 * time.Millisecond, Downtime: 12500 * time.Microsecond, BytesSent: 1 << 20, RAMBytes: 512 << 20,
		Rounds: []migrate.RoundStats{{N: 1, Duration: 900 * time.Millisecond, DirtyPages: 256, PagesSent: 255, PagesZero: 1, BytesSent: 1 << 20}}}
	m.p.Phase = migrate.Phase(status)
	m.mu.Unlock()
	close(m.done)
}

func (m *fakeMigration) Recover(string) error { return migrate.ErrTooLate }

func (m *fakeMigration) Cancel() error {
	m.mu.Lock()
	late := m.late
	m.mu.Unlock()
	if late == nil {
		m.end("cancelled", "migration cancelled")
	}
	return late
}

func (m *fakeMigration) Progress() migrate.Progress {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.p
}

func (m *fakeMigration) Result() migrate.Result {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.res
}

func (m *fakeMigration) Done() <-chan struct{} { return m.done }

// start runs a command beside the test; wait returns how it ended.
func (c *cli) start(args ...string) (p *running) {
	c.t.Helper()
	p = &running{t: c.t, cmd: c.command(c.t.Context(), args...)}
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	if err := p.cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	return p
}

func (f *fakeVM) MeasureDirtyRate(_ context.Context, interval time.Duration) (migrate.DirtyRate, error) {
	time.Sleep(f.slow)
	f.mu.Lock()
	defer f.mu.Unlock()
	return migrate.DirtyRate{Interval: interval, Pages: 512, BytesPerSecond: 2 << 20, RAMBytes: 512 << 20,
		Samples: []migrate.DirtySample{{After: 8 * time.Millisecond, Pages: 4}, {After: 1000 * time.Millisecond, Pages: 512}}}, nil
}

func (f *fakeVM) EstimateMigration(_ context.Context, to string, opt migrate.Options, interval time.Duration) (migrate.Estimate, error) {
	time.Sleep(f.slow)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.to, f.opt = to, opt
	return migrate.Estimate{Converges: opt.DowntimeLimit > 20e6, Note: "too fast", Rounds: 3, Total: 1234 * time.Millisecond, Downtime: 21500 * time.Microsecond, BandwidthBytes: 1 << 30,
		RAMBytes: 512 << 20, DataBytes: 256 << 20, DirtyRate: migrate.DirtyRate{Interval: interval, BytesPerSecond: 2 << 20}}, nil
}
