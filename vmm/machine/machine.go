package machine

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/vmm/acpi"
	"github.com/govmm/govmm/vmm/memory"
	"github.com/govmm/govmm/vmm/platform"
)

// Machine is one KVM VM with its memory, devices and vCPUs: what boots, runs
// once and ends, or is sent to another host. vmm.VM is what goes on when a
// machine is reset.
//
// A machine is made by [New] with its vCPU threads waiting. [Machine.Boot] or
// [Machine.loadState] gives it something to run, and [Machine.Start] lets it run.
// Methods may be called from several goroutines, Close as the last one.
type Machine struct {
	// These do not change once New has returned.
	spec   Spec
	log    *slog.Logger
	ends   Ends
	kernel kernel
	mem    *memory.Memory
	board  board
	vcpus  []*vcpu
	gate   *gate // has its own locks

	// born is the VM generation ID with which the machine boots; zero: a new one. That of a
	// machine that goes on is in its memory.
	born         acpi.Generation
	booted       atomic.Pointer[string] // what was read from its disk; nil: nothing
	bootAtStart  bool                   // Start reads the disk: only then it is this host's
	panicked     atomic.Bool            // the guest's kernel reported a panic
	resetControl atomic.Uint32          // the register at port 0xcf9

	lines   lines   // serial port and console, with their input
	devices devices // guarded by devices.quietMu
	ending  ending  // guarded by ending.exitMu
}

// kernel is what KVM has made for a machine.
type kernel struct {
	sys   *kvm.System
	vm    *kvm.VM
	caps  caps
	msrs  []uint32    // that the state of a vCPU carries
	rings *dirtyRings // nil: the dirty log is a bitmap
	// features are the MSRs that describe the processor to the guest, which are the same on all vCPUs
	// and do not change once the guest runs.
	features []kvm.MSR

	// untouched says of each slot, while the dirty log is on, that the log began empty, and
	// that whoever looked since has found no populated page in the slot.
	untouched []atomic.Bool
}

// caps is which optional parts of KVM this host's kernel has.
type caps struct {
	dirtyLog         int // kvm.DirtyLog flags that are enabled
	sregs2           bool
	exceptionPayload bool
	tripleFault      bool
}

// board is the buses and the chips on them that are no virtio devices.
type board struct {
	ports, mmio Bus
	pci         *pci.Bus
	interrupts  *interrupts
	pm          *platform.PM
	gpe         *platform.GPE
	cmos        *platform.CMOS
	timer       func() error // waits until the 8254 has been made; nil: not begun
}

// ending is how the machine ended.
type ending struct {
	exitMu sync.Mutex // guards exit
	exit   *Exit

	threads        sync.WaitGroup // of vCPUs
	done           chan struct{}  // closed when it has ended and no vCPU runs
	reset          chan struct{}  // closed then, too, if the guest is to be reset
	step           step           // of the end
	disconnectOnce sync.Once
	disconnectErr  error
	closeOnce      sync.Once
	closeErr       error
}

// Acquire takes what only the side that has the right to run the guest may hold:
// the locks of disks, the path of its socket.
func (m *Machine) Acquire() error { return m.devices.backends.lock() }

// Start takes the right to use the disks and lets the vCPUs run, or, when
// paused is set, makes them stand still as after [Machine.Pause]. After an error
// no instruction of the guest was executed.
func (m *Machine) Start(paused bool) error {
	if err := errors.Join(m.Acquire(), m.awaitTimer()); err != nil {
		return err
	}
	if m.bootAtStart {
		if err := m.Boot(); err != nil {
			return err
		}
		m.bootAtStart = false
	}
	if paused {
		if _, err := m.hold(context.Background(), holdUser, 0); err != nil {
			return err
		}
	}
	m.startInput()
	return m.let(holdStart, 0)
}

// Pause stops all vCPUs and then the devices, and returns when none runs, each
// vCPU has completed its last port or memory access, and each device the
// requests that it has taken. Pausing a paused machine does nothing. It fails
// with [ErrHandoff] while the machine is being handed over, with an
// [*EndedError] when it has ended, and when a device does not come to rest before
// ctx ends: the guest then goes on.
func (m *Machine) Pause(ctx context.Context) error {
	_, err := m.hold(ctx, holdUser, holdHandoff)
	return err
}

// Resume undoes Pause, and fails as it does, or when another process holds one of
// the disks: after a migration that failed, for example.
func (m *Machine) Resume() error {
	return m.duringLife(func() error { // its successor has the disks of one that has ended
		if err := m.Acquire(); err != nil {
			return err
		}
		m.startInput()
		return m.release(holdUser, holdHandoff)
	})
}

// hold stops the vCPUs for a reason, and the devices. It fails if one of the
// reasons in unless holds.
func (m *Machine) hold(ctx context.Context, h, unless hold) (before hold, err error) {
	m.devices.quietMu.Lock()
	defer m.devices.quietMu.Unlock()
	before, err = m.gate.hold(ctx, h, unless)
	if err != nil {
		return before, m.explain(err)
	}
	if err := m.devices.pause(ctx); err != nil {
		if before&h == 0 {
			err = errors.Join(err, m.release(h, 0))
		}
		return before, err
	}
	return before, nil
}

// let takes a hold away.
func (m *Machine) let(h, unless hold) error {
	m.devices.quietMu.Lock()
	defer m.devices.quietMu.Unlock()
	return m.release(h, unless)
}

// release takes a hold away. Before the vCPUs run, the devices do, and each guest
// with a kvmclock learns that it stood still, so that its watchdogs do not fire.
// quietMu is held.
func (m *Machine) release(h, unless hold) error {
	return m.explain(m.gate.release(h, unless, func() {
		m.devices.resume(m.log)
		for _, c := range m.vcpus {
			// EINVAL: this vCPU has no kvmclock. Any other failure costs a
			// warning in the guest's log.
			_ = c.kvm.KVMClockCtrl()
		}
	}))
}

// duringLife calls f while nobody pauses, resumes or hands over the machine. It
// fails if the machine has ended or is being handed over.
func (m *Machine) duringLife(f func() error) error {
	m.devices.quietMu.Lock()
	defer m.devices.quietMu.Unlock()
	if err := m.gate.check(holdHandoff); err != nil {
		return m.explain(err)
	}
	return f()
}

// explain turns the gate's error into one that says how the machine ended.
func (m *Machine) explain(err error) error {
	if errors.Is(err, errEnded) {
		return &EndedError{m.Exit()}
	}
	return err
}

// Paused says whether the machine is paused by [Machine.Pause] or was started
// so.
func (m *Machine) Paused() bool { return m.gate.held()&holdUser != 0 }

// Stop ends the machine at once, as pulling the plug would, and returns when
// no vCPU runs any more.
func (m *Machine) Stop() {
	m.Kill()
	<-m.ending.done
}

// Kill is Stop without waiting for the vCPUs.
func (m *Machine) Kill() { m.end(Exit{Kind: ExitStopped}) }

// Done is closed when the machine has ended and no vCPU runs any more.
func (m *Machine) Done() <-chan struct{} { return m.ending.done }

// Wait returns how the machine ended, when it has.
func (m *Machine) Wait(ctx context.Context) (Exit, error) {
	select {
	case <-m.ending.done:
		return m.Exit(), nil
	case <-ctx.Done():
		return Exit{}, context.Cause(ctx)
	}
}

// resets says whether the guest is to be reset, and no vCPU runs.
func (m *Machine) resets() bool {
	select {
	case <-m.ending.reset:
		return true
	default:
		return false
	}
}

// Exit returns how the machine ended; it is meaningful once Done is closed.
func (m *Machine) Exit() Exit {
	m.ending.exitMu.Lock()
	defer m.ending.exitMu.Unlock()
	if m.ending.exit == nil {
		return Exit{}
	}
	return *m.ending.exit
}

// end ends the machine, for the first reason it is given. It does not wait:
// vCPUs call it.
func (m *Machine) end(e Exit) {
	m.ending.exitMu.Lock()
	if m.ending.exit == nil {
		m.ending.exit = &e
	}
	m.ending.exitMu.Unlock()
	m.gate.end()
}

// Memory is the guest's RAM.
func (m *Machine) Memory() *memory.Memory { return m.mem }

// Spec is what the machine was made from.
func (m *Machine) Spec() Spec { return m.spec }
