package api_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
)

// fakeVM is a Controller without a machine.
type fakeVM struct {
	mu        sync.Mutex // guards all below
	info      vmm.Info
	forced    bool
	addr      string
	opt       migrate.Options
	migration *fakeMigration
	err       error // what every call answers
	pressed   int   // how often the power button was
	balloon   balloon.Info
	ended     chan struct{}         // not guarded: made before the server serves
	records   []vmm.MigrationRecord // these three are not guarded: set before the server serves
	events    []vmm.Event
	check     migrate.CheckResult
	stats     vmm.Stats
	standing  chan struct{}
}

func (f *fakeVM) Info() vmm.Info {
	f.mu.Lock()
	defer f.mu.Unlock()
	info := f.info
	if f.migration != nil {
		p := f.migration.Progress()
		info.Migration = &p
	}
	return info
}

func (f *fakeVM) set(state vmm.State) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.info.State = state
	}
	return f.err
}

func (f *fakeVM) Pause(context.Context) error { return f.set(vmm.StatePaused) }

func (f *fakeVM) PowerOff(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pressed++
	return f.err
}

// Ended is closed by end; nil, which blocks, if the test does not make it.
func (f *fakeVM) Ended() <-chan struct{} { return f.ended }

func (f *fakeVM) end(state vmm.State) {
	_ = f.set(state)
	close(f.ended)
}

func (f *fakeVM) Balloon(context.Context) (balloon.Info, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.balloon, f.err
}

func (f *fakeVM) SetBalloon(_ context.Context, target uint64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.balloon.Target = target
	}
	return f.err
}

func (f *fakeVM) Stop(context.Context) error { return f.set(vmm.StateStopped) }
func (f *fakeVM) Resume(_ context.Context, force bool) error {
	f.mu.Lock()
	f.forced = force
	f.mu.Unlock()
	return f.set(vmm.StateRunning)
}

func (f *fakeVM) StartMigration(addr string, opt migrate.Options) (*fakeMigration, error) {
	if err := f.set(vmm.StateMigrating); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.addr, f.opt = addr, opt
	if f.migration == nil {
		f.migration = newFakeMigration()
	}
	return f.migration, nil
}

func (f *fakeVM) Migration() *fakeMigration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.migration
}

// fakeMigration ends when the test says so.
type fakeMigration struct {
	mu        sync.Mutex // guards progress, result, cancelErr
	progress  migrate.Progress
	result    migrate.Result
	cancelErr error
	done      chan struct{}
}

func newFakeMigration() *fakeMigration {
	return &fakeMigration{
		progress: migrate.Progress{Phase: migrate.PhasePrecopy, Round: 1},
		done:     make(chan struct{}),
	}
}

func (m *fakeMigration) end(r migrate.Result) {
	m.mu.Lock()
	m.result = r
	m.progress.Phase = migrate.Phase(r.Status)
	m.mu.Unlock()
	close(m.done)
}

func (m *fakeMigration) Recover(string) error { return migrate.ErrTooLate }

func (m *fakeMigration) Cancel() error {
	m.mu.Lock()
	err := m.cancelErr
	m.mu.Unlock()
	if err == nil {
		m.end(migrate.Result{Status: "cancelled", Error: "migration cancelled"})
	}
	return err
}

func (m *fakeMigration) Progress() migrate.Progress {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.progress
}

func (m *fakeMigration) Result() migrate.Result {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.result
}

func (m *fakeMigration) Done() <-chan struct{} { return m.done }

// serve runs a server for vm in dir until the test ends or stop is called.
func serve(t *testing.T, dir, name string, vm *fakeVM) (c *api.Client, stop func()) {
	t.Helper()
	claim, err := api.ClaimName(dir, name)
	if err != nil {
		t.Fatal(err)
	}
	vm.mu.Lock()
	vm.info.Name = claim.Name()
	vm.mu.Unlock()
	ln, err := claim.Listen()
	if err != nil {
		t.Fatal(err)
	}
	srv := api.NewServer(vm, claim.Socket())
	srv.ProgressInterval = 1e6
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			srv.Shutdown()
			if err := <-served; err != nil {
				t.Errorf("Serve: %v", err)
			}
			claim.Release()
		})
	}
	t.Cleanup(stop)
	return api.Open(claim.Socket()), stop
}

func (f *fakeVM) MeasureDirtyRate(_ context.Context, interval time.Duration) (migrate.DirtyRate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return migrate.DirtyRate{Interval: interval, Pages: 512, BytesPerSecond: 2 << 20, RAMBytes: 512 << 20,
		Samples: []migrate.DirtySample{{After: 8 * time.Millisecond, Pages: 4}, {After: 1000 * time.Millisecond, Pages: 512}}}, f.err
}

func (f *fakeVM) EstimateMigration(_ context.Context, to string, opt migrate.Options, interval time.Duration) (migrate.Estimate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.addr, f.opt = to, opt
	return migrate.Estimate{Converges: opt.DowntimeLimit > 20e6, Note: "too fast", Rounds: 3, Total: 1234 * time.Millisecond, Downtime: 21500 * time.Microsecond, BandwidthBytes: 1 << 30,
		RAMBytes: 512 << 20, DataBytes: 256 << 20, DirtyRate: migrate.DirtyRate{Interval: interval, BytesPerSecond: 2 << 20}}, f.err
}
