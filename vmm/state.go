package vmm

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/vmm/platform"
	"github.com/govmm/govmm/vmm/serial"
)

// StateVersion is the version of [MachineState]. A machine loads its own only.
const StateVersion = 1

// MachineState is all of a machine but its memory: plain data, for the machine's twin
// to load. CPUID and the TSC's frequency are in [Spec]: vCPUs are made with
// them.
type MachineState struct {
	Version uint32
	Clock   ClockState
	VCPUs   []VCPUState
	Chips   ChipState
	Serial  serial.State
	// ResetControl is the port 0xcf9.
	ResetControl byte
	PM           platform.PMState
	CMOS         platform.CMOSState
	Panicked     bool
	Virtio       VirtioState
}

// ChipState is what all vCPUs share: the interrupt controllers and the timer
// of the kernel.
type ChipState struct {
	PICMaster kvm.IRQChip
	PICSlave  kvm.IRQChip
	IOAPIC    kvm.IRQChip
	PIT       kvm.PITState2
}

var (
	// ErrRunning: the call needs a machine that stands still.
	ErrRunning = errors.New("the machine runs")
	// ErrStarted: the call needs a machine that has not been started.
	ErrStarted = errors.New("the machine has been started")
	// ErrHandoff: the machine is just being handed over to another host.
	ErrHandoff = errors.New("the guest is just being handed over")
)

// drainTime is how long a machine that is saved waits for its console to take
// the guest's output. What is left then is still written by this process, as
// it goes on; the guest does not stand still for it.
const drainTime = 50 * time.Millisecond

// SaveState returns the state of a machine that stands still. It fails with
// [ErrRunning] if it does not.
//
// The order: of each vCPU MP_STATE first, because asking for it makes the
// kernel take a pending INIT or SIPI, which changes all other registers; its
// VCPU_EVENTS last, because reading other state may move an event from one
// queue to the next. The serial port before the interrupt controllers: should
// its output drain in between, then the interrupt for it is in their state,
// and in that of the port as well, which raises a line that is up already. The
// devices are quiet, and all that they have raised is in the interrupt
// controllers, before any of that.
func (m *Machine) SaveState() (*MachineState, error) {
	if m.gate.held() == 0 {
		return nil, ErrRunning
	}
	ctx, cancel := context.WithTimeout(context.Background(), drainTime)
	defer cancel()
	if err := m.Drain(ctx); err != nil {
		m.logf("%v", err)
	}
	m.quietMu.Lock()
	defer m.quietMu.Unlock()
	if err := m.quiet(context.Background()); err != nil { // it has not been started
		return nil, err
	}
	s := &MachineState{Version: StateVersion, Serial: m.uart.SaveState(), ResetControl: byte(m.resetControl.Load()),
		PM: m.pm.SaveState(), CMOS: m.cmos.SaveState(), Panicked: m.panicked.Load()}
	var err error
	if s.Virtio, err = m.saveDevices(); err != nil {
		return nil, err
	}
	if s.Clock, err = m.saveClock(); err != nil {
		return nil, err
	}
	s.VCPUs = make([]VCPUState, len(m.vcpus))
	err = m.eachVCPU(func(i int, v *kvm.VCPU) (err error) {
		s.VCPUs[i], err = m.saveVCPU(v)
		return err
	})
	if err != nil {
		return nil, err
	}
	s.Chips, err = m.saveChips()
	return s, err
}

// LoadState puts a machine that has not been started into the state of its
// twin. All memory has landed: KVM reads some of it, and writes some as soon as
// the guest runs. After an error the machine is of no use.
//
// The order: registers of each vCPU; then the clocks, which LAPIC timers and
// deadlines are measured by; the rest of each vCPU (see loadRegisters and
// loadRest). The interrupt controllers come after all local APICs, since they
// hand on what is pending in them. The serial port and power management come
// after them: they set their interrupt lines, which the controllers then take as
// no change. The devices stay quiet until the vCPUs run.
// KVM_KVMCLOCK_CTRL, which tells the guest that it stood still, is left to
// [Machine.Start].
func (m *Machine) LoadState(s *MachineState) error {
	if m.gate.held()&holdStart == 0 {
		return ErrStarted
	}
	if err := m.fits(s); err != nil {
		return err
	}
	if err := m.eachVCPU(func(i int, v *kvm.VCPU) error { return m.loadRegisters(v, &s.VCPUs[i]) }); err != nil {
		return err
	}
	if err := m.loadClock(s); err != nil {
		return err
	}
	if err := m.eachVCPU(func(i int, v *kvm.VCPU) error { return m.loadRest(v, &s.VCPUs[i]) }); err != nil {
		return err
	}
	if err := m.loadChips(&s.Chips); err != nil {
		return err
	}
	m.resetControl.Store(uint32(s.ResetControl &^ resetCPU))
	m.panicked.Store(s.Panicked)
	if err := m.pm.LoadState(s.PM); err != nil {
		return err
	}
	if err := m.cmos.LoadState(s.CMOS); err != nil {
		return err
	}
	m.quietMu.Lock()
	defer m.quietMu.Unlock()
	if err := m.loadDevices(&s.Virtio); err != nil {
		return err
	}
	return m.uart.LoadState(s.Serial)
}

// fits says why the state cannot be one of this machine.
func (m *Machine) fits(s *MachineState) error {
	if s.Version != StateVersion {
		return fmt.Errorf("machine state of version %d: this govmm knows version %d", s.Version, StateVersion)
	}
	if len(s.VCPUs) != len(m.vcpus) {
		return fmt.Errorf("machine state of %d vCPUs: the machine has %d", len(s.VCPUs), len(m.vcpus))
	}
	for i, v := range m.vcpus {
		if s.VCPUs[i].ID != uint32(v.kvm.ID()) {
			return fmt.Errorf("machine state: vCPU %d in the place of %d", s.VCPUs[i].ID, v.kvm.ID())
		}
	}
	return nil
}

// eachVCPU calls f for every vCPU, with its index, on all processors: the ioctls
// of one vCPU wait for none of another's. The error is that of the first vCPU
// that has one.
func (m *Machine) eachVCPU(f func(i int, v *kvm.VCPU) error) error {
	errs := make([]error, len(m.vcpus))
	var next atomic.Int64
	var all sync.WaitGroup
	work := func() {
		for i := int(next.Add(1)) - 1; i < len(m.vcpus); i = int(next.Add(1)) - 1 {
			errs[i] = f(i, m.vcpus[i].kvm)
		}
	}
	for range min(runtime.GOMAXPROCS(0), len(m.vcpus)) - 1 {
		all.Go(work)
	}
	work()
	all.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func (m *Machine) saveChips() (s ChipState, err error) {
	for _, c := range s.all() {
		if *c.state, err = m.vm.GetIRQChip(c.id); err != nil {
			return s, err
		}
	}
	s.PIT, err = m.vm.GetPIT2()
	return s, err
}

func (m *Machine) loadChips(s *ChipState) error {
	for _, c := range s.all() {
		if c.state.ChipID != c.id {
			return fmt.Errorf("machine state: interrupt chip %d in the place of %d", c.state.ChipID, c.id)
		}
		if err := m.vm.SetIRQChip(*c.state); err != nil {
			return err
		}
	}
	return m.vm.SetPIT2(s.PIT)
}

type chip struct {
	id    uint32
	state *kvm.IRQChip
}

func (s *ChipState) all() [3]chip {
	return [...]chip{{kvm.ChipPICMaster, &s.PICMaster}, {kvm.ChipPICSlave, &s.PICSlave}, {kvm.ChipIOAPIC, &s.IOAPIC}}
}

// EncodeState returns the state as it goes over the wire.
func EncodeState(s *MachineState) ([]byte, error) {
	b, err := strictcbor.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode the machine's state: %w", err)
	}
	return b, nil
}

// DecodeState decodes what a stranger may have sent. What the values mean is
// for the kernel to check.
func DecodeState(b []byte) (*MachineState, error) {
	var head struct{ Version uint32 }
	if err := strictcbor.UnmarshalKnown(b, &head); err != nil {
		return nil, fmt.Errorf("decode the machine's state: %w", err)
	}
	if head.Version != StateVersion {
		return nil, fmt.Errorf("machine state of version %d: this govmm knows version %d", head.Version, StateVersion)
	}
	s := new(MachineState)
	if err := strictcbor.Unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("decode the machine's state: %w", err)
	}
	return s, nil
}
