package vmm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/virtio/console"
	"github.com/govmm/govmm/vmm/memory"
	"github.com/govmm/govmm/vmm/platform"
	"github.com/govmm/govmm/vmm/serial"
)

// Addresses that KVM keeps pages of its own at, right below the 4 GiB hole's
// end, where the memory map given to the guest says "reserved". Intel
// processors need them: a TSS (three pages) for real mode, an identity map for
// protected mode without paging.
const (
	identityMapAddr = 0xfffbc000
	tssAddr         = 0xfffbd000
)

// Machine is one KVM VM with its memory, devices and vCPUs: what boots, runs
// once and ends, or is sent to another host. [VM] is what goes on when a
// machine is reset.
//
// A machine is made by [NewMachine] with its vCPU threads waiting. Then it
// gets something to run by [Machine.Boot] or [Machine.LoadState], and
// [Machine.Start] lets it. Methods may be called from several goroutines,
// Close as the last one.
type Machine struct {
	spec Spec
	logf func(format string, args ...any)

	sys   *kvm.System
	vm    *kvm.VM
	mem   *memory.Memory
	stale bool // mem holds something before a kernel is loaded
	ports Bus
	mmio  Bus

	ends  Ends
	uart  *serial.UART
	hvc   *console.Device // nil: none
	feeds []*feed         // the input of both

	pm         *platform.PM
	cmos       *platform.CMOS
	panicked   atomic.Bool
	interrupts *interrupts
	bus        *pci.Bus
	plugged    []plugged
	balloon    *balloon.Balloon // nil: none
	backends   *backends
	shown      backends // of which Info tells; does not change

	// quietMu is held over each hold and release of the gate, and guards what
	// goes with them. It is taken before the gate's locks.
	quietMu sync.Mutex
	isQuiet bool // the devices are paused
	arrived bool // the state was loaded, and the guest has not run here yet

	vcpus   []*vcpu
	gate    *gate
	threads sync.WaitGroup

	caps         caps
	rings        *dirtyRings // nil: the log is a bitmap
	msrs         []uint32    // those that a saved vCPU carries
	resetControl atomic.Uint32

	exitMu sync.Mutex // guards exit
	exit   *Exit
	done   chan struct{} // closed when it has ended and no vCPU runs

	closeOnce sync.Once
	closeErr  error
}

// caps is what this kernel's KVM has of what a machine can do without, or must
// know.
type caps struct {
	dirtyLog         int // kvm.DirtyLog flags that are enabled
	sregs2           bool
	exceptionPayload bool
	tripleFault      bool
}

// NewMachine makes a machine with empty memory, whose lines lead to ends. logf
// gets what a user should know and is no error; nil: nothing. Disks and taps
// are opened; the disks are locked by [Machine.Start].
func NewMachine(spec Spec, ends Ends, logf func(string, ...any)) (*Machine, error) {
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	if logf == nil {
		logf = func(string, ...any) {}
	}
	b, err := openBackends(&spec.Devices, logf)
	if err != nil {
		return nil, fmt.Errorf("make the machine: %w", err)
	}
	return newMachineWith(spec, ends, logf, b)
}

// newMachineWith is NewMachine with backends that are open. They are the
// machine's from now on, also if this fails.
func newMachineWith(spec Spec, ends Ends, logf func(string, ...any), b *backends) (_ *Machine, err error) {
	if ends.Serial == nil {
		ends.Serial = nothing{}
	}
	if ends.Console == nil {
		ends.Console = nothing{}
	}
	m := &Machine{spec: spec, logf: logf, ends: ends, backends: b, gate: newGate(), done: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make the machine: %w", err), m.Close())
		}
	}()
	if m.sys, err = kvm.Open(); err != nil {
		return nil, err
	}
	if _, err := m.sys.RequestXComp(); err != nil {
		// The guest then goes without AMX; CPUID has been asked the same way.
		logf("%v", err)
	}
	if m.vm, err = m.sys.CreateVM(); err != nil {
		return nil, err
	}
	if err := m.enableCaps(); err != nil {
		return nil, err
	}
	m.spec.Needs = needs(m.caps)
	if err := m.createChips(); err != nil {
		return nil, err
	}
	if m.mem, err = memory.New(spec.Memory, spec.Backing); err != nil {
		return nil, err
	}
	if err := m.setSlots(0); err != nil {
		return nil, err
	}
	if m.rings != nil {
		var pages []uint64
		for _, s := range m.mem.Slots() {
			pages = append(pages, s.Size/mempage.Size)
		}
		m.rings = newDirtyRings(m.vm, pages)
	}
	if err := m.connect(); err != nil {
		return nil, err
	}
	if err := m.createChipset(); err != nil {
		return nil, err
	}
	if err := m.createDevices(b); err != nil {
		return nil, err
	}
	return m, m.createVCPUs()
}

// wantedDirtyLog is what is used of manual protection where the kernel has it.
// Tests take some of it away, to be on an older kernel.
var wantedDirtyLog = kvm.DirtyLogManualProtect | kvm.DirtyLogInitiallySet

// enableCaps turns on what has to be on before there are vCPUs and slots.
func (m *Machine) enableCaps() error {
	flags, err := m.vm.CheckExtension(kvm.CapManualDirtyLogProtect2)
	if err != nil {
		return err
	}
	flags &= wantedDirtyLog
	ring, err := m.chooseTracking(flags)
	if err != nil {
		return err
	}
	if ring {
		flags = 0 // they exclude one another, see kvm.VM.EnableDirtyRing
		m.rings = newDirtyRings(m.vm, nil)
	}
	// INITIALLY_SET spares the walk over all page tables when logging starts.
	// It is no use without manual protection and the kernel refuses it.
	m.caps.dirtyLog = flags & (kvm.DirtyLogManualProtect | kvm.DirtyLogInitiallySet)
	if m.caps.dirtyLog != 0 {
		if err := m.vm.EnableCap(kvm.CapManualDirtyLogProtect2, uint64(m.caps.dirtyLog)); err != nil {
			return err
		}
	}
	// With these the state of a vCPU says all that waits to be delivered.
	for _, c := range []struct {
		cap kvm.Capability
		has *bool
	}{
		{kvm.CapExceptionPayload, &m.caps.exceptionPayload},
		{kvm.CapX86TripleFaultEvent, &m.caps.tripleFault},
	} {
		n, err := m.vm.CheckExtension(c.cap)
		if err != nil {
			return err
		}
		if *c.has = n > 0; *c.has {
			if err := m.vm.EnableCap(c.cap, 1); err != nil {
				return err
			}
		}
	}
	n, err := m.vm.CheckExtension(kvm.CapSREGS2)
	m.caps.sregs2 = n > 0
	return err
}

// createChips makes the interrupt controllers and the timer. They come before
// the vCPUs, which get a local APIC only if there are chips.
func (m *Machine) createChips() error {
	if err := m.vm.SetTSSAddr(tssAddr); err != nil {
		return err
	}
	if err := m.vm.SetIdentityMapAddr(identityMapAddr); err != nil {
		return err
	}
	if err := m.vm.CreateIRQChip(); err != nil {
		return err
	}
	table := routes(m.vm)
	if err := m.vm.SetGSIRouting(table); err != nil {
		return err
	}
	m.interrupts = newInterrupts(m.vm, table)
	return m.vm.CreatePIT2(kvm.PITSpeakerDummy) // port 0x61 is used to calibrate the TSC
}

// routes is the kernel's own routing but for the timer: as on a PC, and as the
// MP table says, IRQ 0 is wired to pin 2 of the IOAPIC, and IRQ 2, by which the
// second PIC is chained to the first, to none.
func routes(vm *kvm.VM) []kvm.IRQRoute {
	routes := slices.DeleteFunc(vm.DefaultRoutes(), func(r kvm.IRQRoute) bool {
		return r.Chip == kvm.ChipIOAPIC && r.GSI == 2
	})
	for i := range routes {
		if r := &routes[i]; r.Chip == kvm.ChipIOAPIC && r.GSI == 0 {
			r.Pin = 2
		}
	}
	return routes
}

// setSlots registers all memory with these flags, or changes its flags.
func (m *Machine) setSlots(flags uint32) error {
	for i, s := range m.mem.Slots() {
		err := m.vm.SetUserMemoryRegion(kvm.MemorySlot{Slot: uint32(i), Flags: flags, GPA: s.GPA, Size: s.Size, HVA: s.HVA})
		if err != nil {
			return err
		}
	}
	return nil
}

func (m *Machine) createVCPUs() error {
	for id := range m.spec.CPUs {
		v, err := m.vm.CreateVCPU(id)
		if err != nil {
			return err
		}
		c := &vcpu{machine: m, kvm: v}
		m.vcpus = append(m.vcpus, c)
		m.gate.vcpus = append(m.gate.vcpus, v)
		if m.rings != nil {
			m.rings.vcpus = append(m.rings.vcpus, v)
		}
		// The frequency first: the kernel derives CPUID leaves from it.
		khz, err := v.TSCKHz()
		if err != nil {
			return err
		}
		if m.spec.TSCKHz == 0 {
			m.spec.TSCKHz = khz
		}
		if m.spec.TSCKHz != khz {
			if err := v.SetTSCKHz(m.spec.TSCKHz); err != nil {
				return err
			}
		}
		if err := v.SetCPUID2(cpuidOf(m.spec.CPUID, id, m.spec.CPUs)); err != nil {
			return err
		}
	}
	list, err := m.sys.MSRIndexList()
	if err != nil {
		return err
	}
	// Which of them there are depends on CPUID alone. To be told so for each one
	// that is not takes a system call, better now than while the guest is down.
	present, err := readMSRs(m.vcpus[0].kvm, savedMSRs(list))
	if err != nil {
		return err
	}
	for _, p := range present {
		m.msrs = append(m.msrs, p.Index)
	}
	for _, c := range m.vcpus {
		m.gate.enter()
		m.threads.Go(c.loop)
	}
	go func() {
		m.threads.Wait()
		close(m.done)
	}()
	return nil
}

// Start takes the right to use the disks and lets the vCPUs run, or, when
// paused is set, makes them stand as after [Machine.Pause]. After an error no
// instruction of the guest was executed.
func (m *Machine) Start(paused bool) error {
	if err := m.backends.acquire(); err != nil {
		return err
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
// requests that it had taken. Pausing a paused machine does nothing. It fails
// with [ErrHandoff] while the machine is being handed over, with an
// [*EndedError] when it has ended, and when a device does not come to rest: the
// guest then goes on.
func (m *Machine) Pause() error {
	_, err := m.hold(context.Background(), holdUser, holdHandoff)
	return err
}

// Resume undoes Pause, and fails as it does, or when another process has one of
// the disks: after a migration that came to nothing, say.
func (m *Machine) Resume() error {
	if m.gate.held()&holdHandoff == 0 {
		if err := m.backends.acquire(); err != nil {
			return err
		}
		m.startInput()
	}
	return m.let(holdUser, holdHandoff)
}

// hold stops the vCPUs for a reason, and the devices. It fails if there is one
// of the reasons in unless.
func (m *Machine) hold(ctx context.Context, h, unless hold) (before hold, err error) {
	m.quietMu.Lock()
	defer m.quietMu.Unlock()
	before, err = m.gate.hold(h, unless)
	if err != nil {
		return before, m.explain(err)
	}
	if err := m.quiet(ctx); err != nil {
		if before&h == 0 {
			err = errors.Join(err, m.release(h, 0))
		}
		return before, err
	}
	return before, nil
}

// let takes a hold away.
func (m *Machine) let(h, unless hold) error {
	m.quietMu.Lock()
	defer m.quietMu.Unlock()
	return m.release(h, unless)
}

// release takes a hold away. Before the vCPUs run, the devices do, and each
// guest that has a kvmclock learns that it stood still, so that its watchdogs
// do not bark. quietMu is held.
func (m *Machine) release(h, unless hold) error {
	return m.explain(m.gate.release(h, unless, func() {
		m.wake()
		for _, c := range m.vcpus {
			// EINVAL: this vCPU has no kvmclock. Any other failure costs a
			// warning in the guest's log.
			_ = c.kvm.KVMClockCtrl()
		}
	}))
}

// explain turns the gate's word into one that says how the machine ended.
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
	m.end(Exit{Kind: ExitStopped})
	<-m.done
}

// Done is closed when the machine has ended and no vCPU runs any more.
func (m *Machine) Done() <-chan struct{} { return m.done }

// Wait returns how the machine ended, when it has.
func (m *Machine) Wait(ctx context.Context) (Exit, error) {
	select {
	case <-m.done:
		return m.Exit(), nil
	case <-ctx.Done():
		return Exit{}, context.Cause(ctx)
	}
}

// Exit returns how the machine ended; it is meaningful once Done is closed.
func (m *Machine) Exit() Exit {
	m.exitMu.Lock()
	defer m.exitMu.Unlock()
	if m.exit == nil {
		return Exit{}
	}
	return *m.exit
}

// end ends the machine, for the first reason it is given. It does not wait:
// vCPUs call it.
func (m *Machine) end(e Exit) {
	m.exitMu.Lock()
	if m.exit == nil {
		m.exit = &e
	}
	m.exitMu.Unlock()
	m.gate.end()
}

// Memory is the guest's RAM.
func (m *Machine) Memory() *memory.Memory { return m.mem }

// Spec is what the machine was made from.
func (m *Machine) Spec() Spec { return m.spec }

// Balloon is the machine's memory balloon, nil if it has none.
func (m *Machine) Balloon() *balloon.Balloon { return m.balloon }

// takeBackends takes the disks and taps away from a machine that has ended, so
// that they outlive it.
func (m *Machine) takeBackends() (*backends, error) {
	<-m.done
	err := m.unplug()
	b := m.backends
	m.backends = nil
	return b, err
}

// Ports and MMIO are the machine's buses, to put devices on before Start.
func (m *Machine) Ports() *Bus { return &m.ports }

// MMIO is the bus of the guest physical addresses that are not RAM.
func (m *Machine) MMIO() *Bus { return &m.mmio }

// Close stops the machine and frees everything. Nobody may use its memory any
// more: a migration of it has ended.
func (m *Machine) Close() error {
	m.end(Exit{Kind: ExitStopped})
	m.gate.throttle(0, 0)
	m.gate.settle()
	m.threads.Wait()
	m.closeOnce.Do(func() { m.closeErr = m.free() })
	return m.closeErr
}

func (m *Machine) free() error {
	var errs []error
	errs = append(errs, m.disconnect(), m.unplug(), m.backends.close())
	for _, c := range m.vcpus {
		errs = append(errs, c.kvm.Close())
	}
	if m.vm != nil {
		errs = append(errs, m.vm.Close())
	}
	if m.sys != nil {
		errs = append(errs, m.sys.Close())
	}
	if m.mem != nil { // its slots have gone with the VM
		errs = append(errs, m.mem.Close())
	}
	return errors.Join(errs...)
}
