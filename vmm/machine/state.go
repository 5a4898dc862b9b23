package machine

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/vmm/cpu"
	"github.com/govmm/govmm/vmm/platform"
	"github.com/govmm/govmm/vmm/serial"
)

// stateVersion is the version of [machineState]. A machine loads only its own: what is
// added is a feature, see [Spec].
const stateVersion = 1

// machineState is all of a machine but its memory: plain data, for the machine at the
// destination to load. CPUID and the TSC's frequency are in [Spec]: vCPUs are made
// with them. A field that is added after v0.1.0 is tagged omitzero and belongs to a
// feature of the spec while it is in use.
type machineState struct {
	Version      uint32             `cbor:"version"`
	Clock        clockState         `cbor:"clock"`
	VCPUs        []vcpuState        `cbor:"vcpus"`
	Chips        chipState          `cbor:"chips"`
	Serial       serial.State       `cbor:"serial"`
	ResetControl byte               `cbor:"reset_control"` // port 0xcf9
	PM           platform.PMState   `cbor:"pm"`
	GPE          platform.GPEState  `cbor:"gpe,omitzero"` // feature "gpe"
	CMOS         platform.CMOSState `cbor:"cmos"`
	Panicked     bool               `cbor:"panicked"`
	Virtio       virtioState        `cbor:"virtio"`
	// Reset is set for a guest that is to be reset: it starts anew where it arrives, and
	// nothing else of the state but the version counts. The engine sends it only to a
	// destination that knows it (feature "reset" of the protocol).
	Reset *resetState `cbor:"reset,omitzero"`
}

// resetState is what outlives a guest that is reset, beside the machine's spec.
type resetState struct {
	Balloon uint64 `cbor:"balloon"` // the host's target, in bytes; 0 without a balloon
}

// chipState is what all vCPUs share: the interrupt controllers and the timer
// of the kernel.
type chipState struct {
	PICMaster kvm.IRQChip   `cbor:"pic_master"`
	PICSlave  kvm.IRQChip   `cbor:"pic_slave"`
	IOAPIC    kvm.IRQChip   `cbor:"ioapic"`
	PIT       kvm.PITState2 `cbor:"pit"`
}

var (
	// ErrRunning: the call needs a machine that stands still.
	ErrRunning = errors.New("the machine runs")
	// ErrStarted: the call needs a machine that has not been started.
	ErrStarted = errors.New("the machine has been started")
	// ErrHandoff: the machine is being handed over to another host.
	ErrHandoff = errors.New("the guest is being handed over")
)

// drainTime bounds how long a machine that is saved waits for the other end of its
// lines to take the guest's output. This process goes on writing what is left then;
// the guest does not stand still for it.
const drainTime = 50 * time.Millisecond

// saveState returns the state of a machine that stands still. It fails with
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
func (m *Machine) saveState() (*machineState, error) {
	if m.gate.held() == 0 && !m.resets() {
		return nil, ErrRunning
	}
	ctx, cancel := context.WithTimeout(context.Background(), drainTime)
	defer cancel()
	if err := m.Drain(ctx); err != nil {
		m.log.Warn("output of the guest is left behind", "err", err)
	}
	if m.resets() {
		return &machineState{Version: stateVersion, Reset: m.saveReset()}, nil
	}
	m.devices.quietMu.Lock()
	defer m.devices.quietMu.Unlock()
	if err := m.devices.pause(context.Background()); err != nil { // it has not been started
		return nil, err
	}
	s := &machineState{Version: stateVersion, Serial: m.lines.uart.SaveState(), ResetControl: byte(m.resetControl.Load()),
		PM: m.board.pm.SaveState(), GPE: m.board.gpe.SaveState(), CMOS: m.board.cmos.SaveState(), Panicked: m.panicked.Load()}
	var err error
	if s.Virtio, err = m.saveDevices(); err != nil {
		return nil, err
	}
	if s.Clock, err = m.saveClock(); err != nil {
		return nil, err
	}
	s.VCPUs = make([]vcpuState, len(m.vcpus))
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

// loadState puts a machine that has not been started into a saved state. All memory
// must have landed: KVM reads some of it, and writes some as soon as the guest runs.
// After an error the machine can only be closed.
//
// The order: registers of each vCPU; then the clocks, which LAPIC timers and
// deadlines are measured by; the rest of each vCPU (see loadRegisters and
// loadRest). The interrupt controllers come after all local APICs, since they
// hand on what is pending in them. The serial port and power management come
// after them: they set their interrupt lines, which the controllers then take as
// no change. The devices stay quiet until the vCPUs run.
// [Machine.Start] calls KVM_KVMCLOCK_CTRL, which tells the guest that it stood still.
func (m *Machine) loadState(s *machineState) error {
	if m.gate.held()&holdStart == 0 {
		return ErrStarted
	}
	if err := m.fits(s); err != nil {
		return err
	}
	if s.Reset != nil {
		return m.loadReset(s.Reset)
	}
	if err := m.loadProcessor(s); err != nil {
		return kind.Told(err)
	}
	m.resetControl.Store(uint32(s.ResetControl &^ resetCPU))
	m.panicked.Store(s.Panicked)
	if err := m.board.pm.LoadState(s.PM); err != nil {
		return err
	}
	if err := m.board.gpe.LoadState(s.GPE); err != nil {
		return err
	}
	if err := m.board.cmos.LoadState(s.CMOS); err != nil {
		return err
	}
	m.devices.quietMu.Lock()
	defer m.devices.quietMu.Unlock()
	if err := m.loadDevices(&s.Virtio); err != nil {
		return err
	}
	return m.lines.uart.LoadState(s.Serial)
}

// loadProcessor loads what is KVM's.
func (m *Machine) loadProcessor(s *machineState) error {
	if err := m.eachVCPU(func(i int, v *kvm.VCPU) error { return m.loadRegisters(v, &s.VCPUs[i]) }); err != nil {
		return err
	}
	if err := m.loadClock(s); err != nil {
		return err
	}
	if err := m.eachVCPU(func(i int, v *kvm.VCPU) error { return m.loadRest(v, &s.VCPUs[i]) }); err != nil {
		return err
	}
	m.kernel.features = cpu.FeatureMSRs(m.spec.CPUID, s.VCPUs[0].MSRs)
	return m.loadChips(&s.Chips)
}

// fits reports why this machine cannot load the state.
func (m *Machine) fits(s *machineState) error {
	ids := make([]uint32, len(m.vcpus))
	for i, v := range m.vcpus {
		ids[i] = uint32(v.kvm.ID())
	}
	return s.check(ids, m.spec.CPUID, m.kernel.msrs)
}

// check reports what is not the state of a guest with these vCPUs and this CPUID, saved
// by a host with these MSRs. What it does not look at KVM checks, or the device.
func (s *machineState) check(ids []uint32, cpuid []kvm.CPUIDEntry, msrs []uint32) error {
	if s.Version != stateVersion {
		return fmt.Errorf("machine state: expected version %d, found %d", stateVersion, s.Version)
	}
	if s.Reset != nil {
		return nil
	}
	if len(s.VCPUs) != len(ids) {
		return fmt.Errorf("machine state: expected %d vCPUs, found %d", len(ids), len(s.VCPUs))
	}
	for i, v := range s.VCPUs {
		if v.ID != ids[i] {
			return fmt.Errorf("machine state: expected vCPU %d, found %d", ids[i], v.ID)
		}
		if err := cpu.CheckMSRs(cpuid, msrs, v.MSRs); err != nil {
			return fmt.Errorf("machine state: vCPU %d: %w", v.ID, err)
		}
	}
	return s.Chips.check()
}

// eachVCPU calls f for every vCPU, with its index, on all processors: ioctls of
// different vCPUs do not wait for each other. It returns the error of the first
// vCPU that has one.
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

func (m *Machine) saveReset() *resetState {
	var s resetState
	if b, ok := deviceOf[*balloon.Balloon](m); ok {
		s.Balloon = b.Info().Target
	}
	return &s
}

// loadReset makes the machine what [Machine.Reset] would return: pages of the guest
// that is gone may have landed.
func (m *Machine) loadReset(s *resetState) error {
	ram := guestRAM{m.mem}
	for i, slot := range ram.Slots() {
		if err := ram.Zero(i, 0, slot.Pages); err != nil {
			return err
		}
	}
	if b, ok := deviceOf[*balloon.Balloon](m); ok {
		if err := b.SetTarget(s.Balloon); err != nil {
			return fmt.Errorf("machine state: %w", err)
		}
	}
	m.devices.quietMu.Lock()
	defer m.devices.quietMu.Unlock()
	if err := m.devices.pause(context.Background()); err != nil {
		return err
	}
	m.devices.arrived = true
	if m.bootAtStart = m.spec.Boot != nil; m.bootAtStart {
		return nil // the source may still write the disk
	}
	return m.Boot()
}

func (m *Machine) saveChips() (s chipState, err error) {
	for _, c := range s.all() {
		if *c.state, err = m.kernel.vm.GetIRQChip(c.id); err != nil {
			return s, err
		}
	}
	if err := m.awaitTimer(); err != nil {
		return s, err
	}
	s.PIT, err = m.kernel.vm.GetPIT2()
	return s, err
}

func (m *Machine) loadChips(s *chipState) error {
	for _, c := range s.all() {
		if err := m.kernel.vm.SetIRQChip(*c.state); err != nil {
			return err
		}
	}
	if err := m.awaitTimer(); err != nil {
		return err
	}
	return m.kernel.vm.SetPIT2(s.PIT)
}

// check reports what KVM would not have saved: it takes any state of the PIT.
func (s *chipState) check() error {
	for _, c := range s.all() {
		if c.state.ChipID != c.id {
			return fmt.Errorf("machine state: expected interrupt chip %d, found %d", c.id, c.state.ChipID)
		}
	}
	// The mode is three bits of what the guest wrote, and 0xff before; which halves of a
	// count are accessed is two, and a step of such an access at most 4 (arch/x86/kvm/i8254.c).
	const maxCount, maxMode, noMode, maxAccess, maxStep = 0x10000, 7, 0xff, 3, 4
	for i, c := range s.PIT.Channels {
		if c.Count > maxCount || c.Mode > maxMode && c.Mode != noMode || c.RWMode > maxAccess || c.CountLatched > maxAccess || c.StatusLatched > 1 ||
			c.ReadState > maxStep || c.WriteState > maxStep || c.BCD > 1 || c.Gate > 1 {
			return fmt.Errorf("machine state: channel %d of the PIT: %+v is none of its states", i, c)
		}
	}
	if s.PIT.Flags&^pitFlags != 0 {
		return fmt.Errorf("machine state: flags %#x of the PIT: must be within %#x", s.PIT.Flags, pitFlags)
	}
	return nil
}

// pitFlags are those of KVM_GET_PIT2: HPET_LEGACY, SPEAKER_DATA_ON.
const pitFlags = 1 | 2

type chip struct {
	id    uint32
	state *kvm.IRQChip
}

func (s *chipState) all() [3]chip {
	return [...]chip{{kvm.ChipPICMaster, &s.PICMaster}, {kvm.ChipPICSlave, &s.PICSlave}, {kvm.ChipIOAPIC, &s.IOAPIC}}
}

// encodeState returns the state as it goes over the wire.
func encodeState(s *machineState) ([]byte, error) {
	b, err := strictcbor.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode the machine's state: %w", err)
	}
	return b, nil
}

// rehearse encodes and decodes a state of everything once. The first time in a process
// takes several times as long, since all types are looked at; that is not to be while
// the guest stands still.
var rehearse = sync.OnceFunc(func() {
	s := new(machineState)
	fill(reflect.ValueOf(s).Elem())
	s.Version = stateVersion
	if b, err := encodeState(s); err == nil {
		_, _ = decodeState(b)
	}
})

// fill gives each slice in v one element.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.Slice:
		if v.CanSet() {
			v.Set(reflect.MakeSlice(v.Type(), 1, 1))
			fill(v.Index(0))
		}
	case reflect.Pointer:
		if v.CanSet() {
			v.Set(reflect.New(v.Type().Elem()))
			fill(v.Elem())
		}
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i))
		}
	case reflect.Array:
		if v.Len() > 0 && v.Type().Elem().Kind() == reflect.Struct {
			fill(v.Index(0))
		}
	}
}

// decodeState decodes what an untrusted peer may have sent. The kernel checks what
// the values mean.
func decodeState(b []byte) (*machineState, error) {
	var head struct {
		Version uint32 `cbor:"version"`
	}
	if err := strictcbor.UnmarshalKnown(b, &head); err != nil {
		return nil, fmt.Errorf("decode the machine's state: %w", err)
	}
	if head.Version != stateVersion {
		return nil, fmt.Errorf("machine state: expected version %d, found %d", stateVersion, head.Version)
	}
	s := new(machineState)
	if err := strictcbor.Unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("decode the machine's state: %w", err)
	}
	return s, nil
}
