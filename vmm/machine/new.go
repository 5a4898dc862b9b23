package machine

import (
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"

	"github.com/govmm/govmm/internal/testhook"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/vmm/memory"
)

// New makes a machine with empty memory, whose lines lead to ends. log gets what a
// user should know and is not an error; nil: nothing is logged. Disks and taps are
// opened; [Machine.Acquire] or [Machine.Start] locks the disks.
func New(spec Spec, ends Ends, log *slog.Logger) (*Machine, error) {
	if err := MakeAbsolute(spec.Devices); err != nil {
		return nil, err
	}
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	b, err := openBackends(spec.Devices, log, nil, nil)
	if err != nil {
		return nil, fmt.Errorf("make the machine: %w", tooFewFiles(err))
	}
	return newChecked(spec, ends, log, b, nil)
}

// newChecked is newWith for a machine that is new in this process, which may have too few
// open files for it.
func newChecked(spec Spec, ends Ends, log *slog.Logger, b backends, mem *memory.Memory) (*Machine, error) {
	m, err := newWith(spec, ends, log, b, mem)
	if err != nil {
		return nil, tooFewFiles(err)
	}
	if err := checkFiles(); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

// newWith is New with backends that are open, and memory, if it is not nil. They belong to
// the machine from now on, also if this fails.
func newWith(spec Spec, ends Ends, log *slog.Logger, b backends, mem *memory.Memory) (_ *Machine, err error) {
	m := &Machine{spec: spec, log: log, ends: ends.orNothing(), gate: newGate(), mem: mem, ending: ending{done: make(chan struct{}), reset: make(chan struct{})}}
	m.devices.backends = b
	readHost()
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make the machine: %w", err), m.Close())
		}
	}()
	if m.kernel.sys, err = kvm.Shared(); err != nil {
		return nil, err
	}
	if _, err := m.kernel.sys.RequestXComp(); err != nil {
		// The guest then has no AMX; cpu.Supported asked in the same way.
		log.Warn("the guest has no AMX", "err", err)
	}
	if m.kernel.vm, err = m.kernel.sys.CreateVM(); err != nil {
		return nil, err
	}
	ring, err := m.enableCaps()
	if err != nil {
		return nil, err
	}
	m.spec.Needs = needs(m.kernel.caps)
	if m.mem == nil {
		if m.mem, err = memory.New(spec.Memory, spec.Backing); err != nil {
			return nil, err
		}
	}
	m.kernel.untouched = make([]atomic.Bool, len(m.mem.Slots()))
	// Before the chips: they leave the kernel a grace period to wait for (SRCU),
	// which a slot that is registered would wait for as well, for milliseconds.
	if err := m.setSlots(0); err != nil {
		return nil, err
	}
	if err := m.createChips(); err != nil {
		return nil, err
	}
	if ring {
		m.kernel.rings = newDirtyRings(m.kernel.vm, m.mem.Slots())
	}
	if err := m.createSerial(); err != nil {
		return nil, err
	}
	if err := m.createChipset(); err != nil {
		return nil, err
	}
	if err := m.createDevices(); err != nil {
		return nil, err
	}
	return m, m.createVCPUs()
}

// enableCaps turns on what has to be on before there are vCPUs and slots. ring
// says that the dirty log is kept in rings.
func (m *Machine) enableCaps() (ring bool, err error) {
	vm, c := m.kernel.vm, &m.kernel.caps
	flags, err := vm.CheckExtension(kvm.CapManualDirtyLogProtect2)
	if err != nil {
		return false, err
	}
	flags &^= int(testhook.WithoutDirtyLog.Load())
	if ring, err = m.chooseTracking(flags); err != nil {
		return false, err
	}
	if ring {
		flags = 0 // rings and manual protection exclude each other, see kvm.VM.EnableDirtyRing
	}
	// INITIALLY_SET spares the walk over all page tables when logging starts.
	// The kernel refuses it without manual protection.
	c.dirtyLog = flags & (kvm.DirtyLogManualProtect | kvm.DirtyLogInitiallySet)
	if c.dirtyLog != 0 {
		if err := vm.EnableCap(kvm.CapManualDirtyLogProtect2, uint64(c.dirtyLog)); err != nil {
			return false, err
		}
	}
	// With these the state of a vCPU has all that waits to be delivered.
	for _, o := range []struct {
		cap kvm.Capability
		has *bool
	}{
		{kvm.CapExceptionPayload, &c.exceptionPayload},
		{kvm.CapX86TripleFaultEvent, &c.tripleFault},
	} {
		n, err := vm.CheckExtension(o.cap)
		if err != nil {
			return false, err
		}
		if *o.has = n > 0; *o.has {
			if err := vm.EnableCap(o.cap, 1); err != nil {
				return false, err
			}
		}
	}
	n, err := vm.CheckExtension(kvm.CapSREGS2)
	c.sregs2 = n > 0
	return ring, err
}

// setSlots registers all memory with these flags, or changes its flags.
func (m *Machine) setSlots(flags uint32) error {
	for i, s := range m.mem.Slots() {
		if err := m.setSlot(i, s, flags); err != nil {
			return err
		}
	}
	return nil
}

func (m *Machine) setSlot(i int, s memory.Slot, flags uint32) error {
	return m.kernel.vm.SetUserMemoryRegion(kvm.MemorySlot{Slot: uint32(i), Flags: flags, GPA: s.GPA, Size: s.Size, HVA: s.HVA})
}

// Reset closes a machine that has ended and returns one made from the same spec,
// with the kernel loaded and not started. Disks stay locked and taps in place. The
// host's target for the balloon stays. Nobody may use the machine any more, whether
// this fails or not.
func (m *Machine) Reset() (*Machine, error) {
	<-m.ending.done
	born, _ := m.generation() // it is the same machine
	next, err := m.remake(false)
	if err != nil {
		return nil, fmt.Errorf("reset: %w", err)
	}
	next.born = born
	if err := next.Boot(); err != nil {
		return nil, errors.Join(fmt.Errorf("reset: %w", err), next.Close())
	}
	return next, nil
}

// remake closes a machine that has ended and returns one made from the same spec, with
// the same backends, and the same memory if keep is set.
func (m *Machine) remake(keep bool) (*Machine, error) {
	<-m.ending.done
	err := m.unplug()
	m.devices.quietMu.Lock() // nobody is resuming it
	b := m.devices.backends
	m.devices.backends = backends{}
	m.devices.quietMu.Unlock()
	var mem *memory.Memory
	if keep {
		mem, m.mem = m.mem, nil
	}
	if err := errors.Join(err, m.Close()); err != nil {
		m.log.Warn("free the machine that was replaced", "err", err)
	}
	return newWith(m.spec, m.ends, m.log, b, mem)
}

// Close stops the machine and frees everything. Nobody may use its memory any
// more: a migration of it has ended.
func (m *Machine) Close() error {
	m.ending.closeOnce.Do(func() { m.ending.closeErr = errors.Join(m.Disconnect(), m.free()) })
	return m.ending.closeErr
}

// Disconnect ends the vCPUs, and gives up all that has a name on this host: disks, taps,
// sockets, the ends of lines. What stays until Close is memory.
func (m *Machine) Disconnect() error {
	m.Kill()
	m.gate.throttle(0, 0)
	m.gate.join()
	m.ending.threads.Wait()
	m.ending.disconnectOnce.Do(func() {
		m.ending.disconnectErr = errors.Join(m.closeSerial(), m.unplug(), m.devices.backends.close(&m.ending.step))
		m.ending.step.begin(stepMemory)
	})
	return m.ending.disconnectErr
}

// unplug frees the devices of a machine whose vCPUs have ended. What ties their eventfds to
// KVM is freed with KVM's VM: one by one each would wait for a grace period of the kernel,
// and a source that has handed its guest over, and a reset, would wait for all.
func (m *Machine) unplug() error {
	if m.board.interrupts != nil {
		m.board.interrupts.over.Store(true)
	}
	return m.devices.unplug(&m.ending.step)
}

func (m *Machine) free() error {
	var errs []error
	for _, c := range m.vcpus {
		errs = append(errs, c.kvm.Close())
	}
	_ = m.awaitTimer() // Start has reported it, or nobody needed it
	if m.kernel.vm != nil {
		errs = append(errs, m.kernel.vm.Close())
	}
	if m.mem != nil { // its slots have gone with the VM
		errs = append(errs, m.mem.Close())
	}
	return errors.Join(errs...)
}
