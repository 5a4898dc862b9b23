package vmm

import (
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/govmm/govmm/guest"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/memory"
	"github.com/govmm/govmm/vmm/serial"
)

// Config says what machine a [VM] is.
type Config struct {
	Name    string         // "": vm
	CPUs    int            // 0: 1
	CPU     string         // the processor, one of CPUModels; "": CPUHost
	Memory  uint64         // bytes; 0: 256 MiB
	Backing memory.Backing // "": memory.DefaultBacking
	// Tracking is how the guest's writes are tracked when it is migrated; "": TrackAuto.
	Tracking DirtyTracking
	// Kernel is an ELF file with a PVH entry, or a bzImage. nil: the demo guest
	// of package guest, with its default command line if Cmdline is empty.
	Kernel []byte
	// Cmdline is the kernel's command line. "": console=ttyS0, and, if there is
	// a disk and no Initrd, the first disk as the root.
	Cmdline string
	// Initrd is the initial RAM disk; nil: none.
	Initrd []byte
	// NoUnpack lets a bzImage unpack itself in the guest.
	NoUnpack bool
	// Prefill is for tests: all RAM from 1 MiB up has a pattern other than zero
	// before the kernel is loaded, so that memory which the guest never uses is
	// neither a hole nor zero; nor does it become a hole when the guest reports
	// it as free. Where the guest moves, and when it resets itself, all is as ever.
	Prefill bool
	// Devices are the virtio devices.
	Devices Devices
	// Serial is the other end of the guest's serial port; nil: nothing. It
	// stays open when the guest resets itself; [VM.Run] closes it at its end.
	Serial serial.Backend
	// Console is the other end of the virtio console, as Serial; nil: there is
	// no such device, unless Devices has it.
	Console serial.Backend
	// Logf gets one line at a time of what a user should know; nil: nothing.
	Logf func(format string, args ...any)
}

const defaultMemory = 256 << 20

// withDefaults replaces zero values by what they stand for.
func (c Config) withDefaults() Config {
	if c.Name == "" {
		c.Name = "vm"
	}
	if c.CPUs == 0 {
		c.CPUs = 1
	}
	if c.Memory == 0 {
		c.Memory = defaultMemory
	}
	if c.Backing == "" {
		c.Backing = memory.DefaultBacking
	}
	if c.Kernel == nil {
		c.Kernel = guest.ELF
		if c.Cmdline == "" {
			c.Cmdline = guest.DefaultCmdline
		}
	}
	if c.Cmdline == "" {
		c.Cmdline = defaultCmdline(&c)
	}
	c.Devices.Console = c.Devices.Console || c.Console != nil
	return c
}

// defaultCmdline lets a Linux kernel say what it does, and find its root.
func defaultCmdline(c *Config) string {
	const console = "console=ttyS0"
	switch {
	case len(c.Initrd) > 0 || len(c.Devices.Disks) == 0:
		return console
	case c.Devices.Disks[0].ReadOnly:
		return console + " root=/dev/vda ro"
	}
	return console + " root=/dev/vda rw"
}

// NewSpec returns what a machine of this configuration is made from, on this
// host.
func NewSpec(c Config) (spec Spec, err error) {
	c = c.withDefaults()
	model, err := baselineOf(c.CPU)
	if err != nil {
		return spec, err
	}
	sys, err := kvm.Open()
	if err != nil {
		return spec, err
	}
	defer func() { err = errors.Join(err, sys.Close()) }()
	cpuid, err := supportedCPUID(sys)
	if err != nil {
		return spec, err
	}
	if model != nil {
		if cpuid, err = model.cpuid(cpuid, c.Memory); err != nil {
			return spec, err
		}
	}
	spec = Spec{Version: SpecVersion, Name: c.Name, CPUs: c.CPUs, Memory: c.Memory, Backing: c.Backing,
		Cmdline: c.Cmdline, Kernel: c.Kernel, Initrd: c.Initrd, NoUnpack: c.NoUnpack, Devices: c.Devices, CPUID: cpuid, Tracking: c.Tracking}
	if err := spec.Validate(); err != nil {
		return spec, err
	}
	return spec, fitsHost(spec.Memory)
}

// VM is a virtual machine with a name that goes on through resets of its guest
// and can be migrated away: what the process of `govmm run` or `govmm receive`
// holds. It is made by [NewVM] or [NewReceiver], and lives in [VM.Run]. All
// other methods may be called from any goroutine, before, during and after.
type VM struct {
	name  string
	logf  func(format string, args ...any)
	lines []serial.Backend // closed at the end
	ends  Ends

	receiver *migrate.Receiver // nil for a VM that was not received
	listener net.Listener

	stopOnce sync.Once
	stopping chan struct{} // closed by Stop, and when Run's context ends
	ended    chan struct{} // closed at the end of Run
	left     chan struct{} // closed when the guest has moved away

	// lifeMu guards all below. It is not held while a vCPU, a peer or a disk is
	// waited for.
	lifeMu    sync.Mutex
	life      life
	machine   *Machine      // what runs, or is to run; nil until something has arrived
	incoming  *Machine      // what is being received
	changed   chan struct{} // closed when machine or life changes
	measuring *measurement  // under way, nil if none is
	outgoing  *outgoing     // the last migration from here, nil if there was none
	arriving  bool          // what was received is just being started
	refusing  bool          // PowerOff ends a VM without a guest: none may arrive
}

// life is how far a VM has come.
type life uint8

const (
	lifeNew     life = iota // Run has not been called
	lifeRunning             // Run is at work
	lifeEnded
	lifeMigrated
)

func newVM(name string, port, console serial.Backend, logf func(string, ...any)) *VM {
	if logf == nil {
		logf = func(string, ...any) {}
	}
	v := &VM{name: name, logf: logf, stopping: make(chan struct{}),
		ended: make(chan struct{}), left: make(chan struct{}), changed: make(chan struct{})}
	if port != nil {
		v.ends.Serial, v.lines = port, append(v.lines, port)
	}
	if console != nil {
		v.ends.Console, v.lines = console, append(v.lines, console)
	}
	return v
}

// NewVM makes a VM, loads its kernel and locks its disks. The guest runs when
// [VM.Run] is called.
func NewVM(cfg Config) (*VM, error) {
	cfg = cfg.withDefaults()
	spec, err := NewSpec(cfg)
	if err != nil {
		return nil, err
	}
	v := newVM(cfg.Name, cfg.Serial, cfg.Console, cfg.Logf)
	m, err := NewMachine(spec, v.ends, v.logf)
	if err == nil && cfg.Prefill {
		m.prefill()
	}
	m, err = booted(m, err)
	if err != nil {
		return nil, err
	}
	if err := m.backends.acquire(); err != nil { // before anybody is told that it runs
		return nil, errors.Join(err, m.Close())
	}
	v.machine = m
	return v, nil
}

// booted loads the kernel of a machine that was just made, if it was.
func booted(m *Machine, err error) (*Machine, error) {
	if err != nil {
		return nil, err
	}
	if err := m.Boot(); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

// Errors of a VM, matched with errors.Is.
var (
	// ErrState: the VM's state does not allow the call. All of the refusals of
	// Pause, Resume and StartMigration match it.
	ErrState = errors.New("not possible in this state")
	// ErrInvalid: the request itself makes no sense.
	ErrInvalid = errors.New("invalid request")
)

// kindError has words of its own, and matches a sentinel.
type kindError struct {
	kind error
	err  error
}

func (e *kindError) Error() string        { return e.err.Error() }
func (e *kindError) Is(target error) bool { return target == e.kind }
func (e *kindError) Unwrap() error        { return e.err }

func stateError(format string, args ...any) error {
	return &kindError{ErrState, fmt.Errorf(format, args...)}
}

// Pause stops the guest and returns when none of its vCPUs runs. A migration
// goes on; the guest then arrives paused.
func (v *VM) Pause() error {
	return v.onMachine(func(m *Machine) error { return m.Pause() })
}

// Resume lets a paused guest run. It is refused when the guest may run
// elsewhere: once a migration has handed it over, only the destination's word
// gives it back. force overrides that, and if the destination runs the guest,
// the guest then runs twice.
func (v *VM) Resume(force bool) error {
	v.lifeMu.Lock()
	o := v.outgoing
	v.lifeMu.Unlock()
	if o != nil && o.handedOver() {
		if !force {
			return stateError("the guest may run at %s: resume it there, or wait for that side's word; "+
				"resume --force takes it back here, and makes it run twice if it does", o.addr)
		}
		if err := o.takeBack(); err != nil {
			return err
		}
	}
	return v.onMachine(func(m *Machine) error { return m.Resume() })
}

// onMachine acts on the guest's machine, or, if that is just being reset, on
// the one that follows it.
func (v *VM) onMachine(act func(*Machine) error) error {
	for {
		v.lifeMu.Lock()
		m, life, changed := v.machine, v.life, v.changed
		v.lifeMu.Unlock()
		switch {
		case life == lifeMigrated:
			return stateError("the guest has moved away")
		case life == lifeEnded:
			return stateError("the VM has stopped")
		case m == nil:
			return stateError("no guest has arrived yet")
		}
		err := act(m)
		ended := (*EndedError)(nil)
		switch {
		case errors.Is(err, ErrHandoff):
			return stateError("the guest is just being handed over: ask again when the migration has ended")
		case errors.As(err, &ended) && ended.Exit.Kind == ExitReset:
			<-changed // Run makes the next machine, or ends
		case errors.As(err, &ended):
			return stateError("%w", err)
		default:
			return err
		}
	}
}

// Stop ends the VM at once, as pulling the plug would; a migration under way is
// cancelled. It returns when everything is freed.
func (v *VM) Stop() error {
	v.lifeMu.Lock()
	unborn := v.life == lifeNew
	if unborn {
		v.life = lifeEnded // Run will do nothing
	}
	v.lifeMu.Unlock()
	v.stopOnce.Do(func() { close(v.stopping) })
	if !unborn {
		<-v.ended
		return nil
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
