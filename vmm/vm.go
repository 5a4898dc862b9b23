package vmm

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"

	"github.com/govmm/govmm/internal/boundedlog"
	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/govmm/govmm/vmm/serial"
)

// VM is a virtual machine with a name that goes on through resets of its guest
// and can be migrated away: what the process of `govmm run` or `govmm receive`
// holds. It is made by [NewVM] or [NewReceiver], and lives in [VM.Run]. All
// other methods may be called from any goroutine, before, during and after.
type VM struct {
	name  string
	log   *slog.Logger
	lines []*line // closed at the end
	// shared are the lines by the names under which they are attached to.
	shared map[string]*serial.Shared
	ends   machine.Ends

	resets   resets            // of Run's goroutine
	started  func()            // called by Run when the guest runs; nil: nothing
	receiver *migrate.Receiver // nil for a VM that was not received
	listener net.Listener

	stopOnce sync.Once
	stopping chan struct{}          // closed by Stop, and when Run's context ends
	ended    chan struct{}          // closed at the end of Run
	here     chan struct{}          // closed when the guest of a receiver runs here
	left     chan struct{}          // closed when the guest has moved away
	moved    chan struct{}          // closed when nothing with a name is left of it here
	step     atomic.Pointer[string] // what the end has begun, if it is not the machine's
	events   events
	statm    *os.File // kept: a sandbox lets nobody open it later; nil: it cannot be opened

	// lifeMu guards all below. It is not held while a vCPU, a peer or a disk is
	// waited for.
	lifeMu    sync.Mutex
	life      life
	machine   *machine.Machine // what runs, or is to run; nil until something has arrived
	incoming  *machine.Machine // what is being received
	changed   chan struct{}    // closed when machine or life changes
	measuring *measurement     // under way, nil if none is
	outgoing  *outgoing        // the last migration from here, nil if there was none
	history   history
	arriving  bool  // what was received is just being started
	rebooting bool  // Run replaces the machine: no migration begins
	lost      error // why there is no machine after a reset
	refusing  bool  // PowerOff ends a VM without a guest: none may arrive
}

// life is how far a VM has come.
type life uint8

const (
	lifeNew     life = iota // Run has not been called
	lifeRunning             // Run is at work
	lifeEnded
	lifeMigrated
)

func newVM(name string, port, console serial.Backend, log *slog.Logger) *VM {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	v := &VM{name: name, shared: map[string]*serial.Shared{}, stopping: make(chan struct{}),
		ended: make(chan struct{}), here: make(chan struct{}), left: make(chan struct{}), moved: make(chan struct{}), changed: make(chan struct{})}
	v.statm, _ = os.Open("/proc/self/statm")
	log = boundedlog.Watch(boundedlog.New(log), v.logged)
	v.log = log
	if port != nil {
		v.shared[LineSerial] = serial.Share(port)
		l := &line{Backend: v.shared[LineSerial], name: "serial port", log: log}
		v.ends.Serial, v.lines = l, append(v.lines, l)
	}
	if console != nil {
		v.shared[LineConsole] = serial.Share(console)
		l := &line{Backend: v.shared[LineConsole], name: "console", log: log}
		v.ends.Console, v.lines = l, append(v.lines, l)
	}
	return v
}

// NewVM makes a VM, loads its kernel and locks its disks. The guest runs when
// [VM.Run] is called.
func NewVM(cfg Config) (*VM, error) {
	spec, err := cfg.spec()
	if err != nil {
		return nil, err
	}
	v := newVM(spec.Name, cfg.Serial, cfg.Console, cfg.Log)
	m, err := machine.New(spec, v.ends, v.log)
	if err != nil {
		return nil, err
	}
	err = m.Boot()
	if err == nil {
		err = m.Acquire() // before anybody is told that it runs
	}
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	v.machine = m
	return v, nil
}

// Errors of a VM, matched with errors.Is.
var (
	// ErrState: the VM's state does not allow the call. All of the refusals of
	// Pause, Resume and StartMigration match it.
	ErrState = kind.ErrState
	// ErrInvalid: the request itself makes no sense.
	ErrInvalid = kind.ErrInvalid
	// ErrNoBalloon: the VM has no memory balloon. It comes with ErrState.
	ErrNoBalloon = machine.ErrNoBalloon
	// ErrMayRunElsewhere: the guest was handed over and its destination has not
	// said whether it runs there. It comes with ErrState.
	ErrMayRunElsewhere = errors.New("the guest may run elsewhere")
)

// Pause stops the guest and returns when none of its vCPUs runs. A migration
// goes on; the guest then arrives paused.
func (v *VM) Pause(ctx context.Context) error {
	defer v.noteState()
	return v.onMachine(ctx, func(m *machine.Machine) error { return m.Pause(ctx) })
}

// Resume lets a paused guest run. It is refused with [ErrMayRunElsewhere] once a
// migration has handed the guest over: only the destination's answer gives it
// back. force overrides that, and if the destination runs the guest, the guest
// then runs twice.
func (v *VM) Resume(ctx context.Context, force bool) error {
	v.lifeMu.Lock()
	o := v.outgoing
	v.lifeMu.Unlock()
	if o != nil && o.handedOver() {
		if !force {
			return kind.State("%w: resume it at %s, or wait for that side's answer", ErrMayRunElsewhere, o.addr)
		}
		if err := o.takeBack(); err != nil {
			return err
		}
	}
	defer v.noteState()
	return v.onMachine(ctx, func(m *machine.Machine) error { return m.Resume() })
}

// onMachine acts on the guest's machine, or, if that is just being reset, on
// the one that follows it.
func (v *VM) onMachine(ctx context.Context, act func(*machine.Machine) error) error {
	for {
		v.lifeMu.Lock()
		m, life, changed := v.machine, v.life, v.changed
		v.lifeMu.Unlock()
		switch {
		case life == lifeMigrated:
			return kind.State("the guest has moved away")
		case life == lifeEnded:
			return kind.State("the VM has stopped")
		case m == nil:
			return kind.State("no guest has arrived yet")
		}
		err := act(m)
		ended := (*machine.EndedError)(nil)
		switch {
		case errors.Is(err, machine.ErrHandoff):
			return kind.State("the guest is just being handed over: ask again when the migration has ended")
		case errors.As(err, &ended) && ended.Exit.Kind == machine.ExitReset:
			select {
			case <-changed: // Run makes the next machine, or ends
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		case errors.As(err, &ended):
			return kind.State("%w", err)
		default:
			return err
		}
	}
}

// Stopping is closed when the VM was told to end at once, by [VM.Stop] or by the end of Run's
// context, and when Run has returned.
func (v *VM) Stopping() <-chan struct{} { return v.stopping }

// Awaits says in a few words what the end of the VM waits for, for a process that does not
// want to wait any longer. freeing is set if it is nothing but guest memory that is given
// back to the host: that, the end of the process does as well.
func (v *VM) Awaits() (what string, freeing bool) {
	if now := v.step.Load(); now != nil {
		return *now, false
	}
	v.lifeMu.Lock()
	m := v.machine
	if v.incoming != nil {
		m = v.incoming
	}
	v.lifeMu.Unlock()
	if m == nil {
		return "the receiver's connections", false
	}
	return m.Awaits()
}

// during calls f, whose end is waited for under this name.
func (v *VM) during(what string, f func()) {
	v.step.Store(&what)
	defer v.step.Store(nil)
	f()
}

// Stop ends the VM at once, as pulling the plug would; a migration under way is
// cancelled. It returns when everything is freed, or when ctx ends: the VM then
// goes on ending.
func (v *VM) Stop(ctx context.Context) error {
	v.lifeMu.Lock()
	unborn := v.life == lifeNew
	if unborn {
		v.life = lifeEnded // Run will do nothing
	}
	v.lifeMu.Unlock()
	v.stopOnce.Do(func() { close(v.stopping) })
	if !unborn {
		select {
		case <-v.ended:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	v.cancelMigration()
	var err error
	if v.listener != nil {
		err = v.listener.Close()
	}
	err = errors.Join(err, v.free(lifeEnded))
	close(v.ended)
	return err
}
