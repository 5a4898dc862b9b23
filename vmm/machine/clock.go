package machine

import (
	"errors"
	"fmt"
	"time"

	"github.com/govmm/govmm/internal/bootid"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/vmm/cpu"
)

// A guest has two clocks that run on while it is moved: its TSC, and kvmclock,
// which the kernel derives from a clock of the VM. Both must follow real time and
// never go back. So a state has what they showed and the real time at that moment;
// the destination adds the time that has passed since. Between two hosts this is
// as exact as their real-time clocks agree, as long as that is possible: the
// destination knows, by its own clock, a moment before and one after the state was
// saved. Real-time clocks that disagree with these are not believed.
//
// Within one boot of one host (a guest that moves to another process) the TSC is
// the same, and its offset is copied: that is exact.

// clockState is the time of a machine.
type clockState struct {
	Boot string `cbor:"boot"` // identifies the boot of the source's host
	// KVM is the VM's clock. If its flags have no ClockRealtime, KVMRealtime
	// is the moment at which it was read.
	KVM         kvm.ClockData `cbor:"kvm"`
	KVMRealtime int64         `cbor:"kvm_realtime"` // nanoseconds since 1970
	// TSC is what vCPU 0's TSC was at TSCRealtime.
	TSC         uint64 `cbor:"tsc"`
	TSCRealtime int64  `cbor:"tsc_realtime"`
	TSCKHz      uint64 `cbor:"tsc_khz"`

	saved window // set by the destination
	kept  bool   // it was kept in a snapshot: for how long, only real-time clocks say
	skew  int64  // nanoseconds by which this host's real-time clock is taken to be ahead
}

// window is when a state was saved: between two moments of this process, with their
// monotonic readings. The zero window says nothing.
type window struct{ after, before time.Time }

// check compares the real-time clocks of the two hosts with the window. If they are
// wrong the state counts as saved at the window's end: on most links that is soon after.
func (c *clockState) check(now time.Time) (wrong bool) {
	c.skew = 0
	if c.saved.after.IsZero() {
		return false
	}
	passed := time.Duration(now.UnixNano() - c.TSCRealtime)
	least, most := now.Sub(c.saved.before), now.Sub(c.saved.after)
	if passed >= least && passed <= most {
		return false
	}
	c.skew = int64(passed - least)
	return true
}

// passed returns the nanoseconds from a moment of the source to one here, never below 0.
func (c *clockState) passed(since, now int64) int64 {
	if c.kept {
		return within(since, now, maxKept)
	}
	if c.saved.after.IsZero() {
		return elapsed(since, now)
	}
	return max(0, now-c.skew-since)
}

// maxElapsed bounds the time for which a state can have been on its way that says
// nothing of that. If the clocks of two hosts differ by more, they are taken to be
// unrelated.
const maxElapsed = 10 * time.Minute

func (c *clockState) sameBoot() bool { return c.Boot != "" && c.Boot == bootid.ID() }

// elapsed returns the nanoseconds from a moment to now, never below 0.
func elapsed(since, now int64) int64 {
	return within(since, now, maxElapsed)
}

// maxKept bounds the time for which a snapshot can have been kept. A clock that says more
// was not set, here or there.
const maxKept = 20 * 365 * 24 * time.Hour

// within returns the nanoseconds from a moment to now, or 0 if they are not between 0 and
// most.
func within(since, now int64, most time.Duration) int64 {
	d := now - since
	if d < 0 || d > int64(most) {
		return 0
	}
	return d
}

// sample reads something at a known moment of real time. It takes the quickest of a
// few attempts, since a thread may be interrupted between two readings.
func sample[T any](read func() (T, error)) (value T, at int64, err error) {
	best := int64(-1)
	for range 5 {
		before := time.Now()
		v, err := read()
		if err != nil {
			return v, 0, err
		}
		if took := int64(time.Since(before)); best < 0 || took < best {
			value, at, best = v, before.UnixNano()+took/2, took
		}
	}
	return value, at, nil
}

// guestTSC reads a vCPU's TSC.
func guestTSC(v *kvm.VCPU) (uint64, error) {
	list, err := v.GetMSRs([]uint32{cpu.MSRTSC})
	if err != nil {
		return 0, err
	}
	return list[0].Data, nil
}

// tscOffset returns nil if this kernel has no such attribute.
func tscOffset(v *kvm.VCPU) (*uint64, error) {
	offset, err := v.TSCOffset()
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		return nil, nil
	case err != nil:
		return nil, err
	}
	return &offset, nil
}

func (m *Machine) saveClock() (c clockState, err error) {
	c.Boot = bootid.ID()
	boot := m.vcpus[0].kvm
	if c.TSCKHz, err = boot.TSCKHz(); err != nil {
		return c, err
	}
	if c.TSC, c.TSCRealtime, err = sample(func() (uint64, error) { return guestTSC(boot) }); err != nil {
		return c, err
	}
	c.KVM, c.KVMRealtime, err = sample(m.kernel.vm.GetClock)
	return c, err
}

// loadClock sets the VM's clock, and then the TSCs, which the clock does not touch.
func (m *Machine) loadClock(s *machineState) error {
	if s.Clock.check(time.Now()) {
		m.log.Warn("the real-time clocks of the two hosts differ, and the guest's clocks do without them", "by", time.Duration(s.Clock.skew).Round(time.Millisecond))
	}
	if err := m.loadKVMClock(&s.Clock); err != nil {
		return err
	}
	return m.loadTSC(s)
}

// loadKVMClock lets the kernel add the time that has passed where it can, since
// it reads both clocks at one moment.
func (m *Machine) loadKVMClock(c *clockState) error {
	now := time.Now().UnixNano()
	known, err := m.kernel.vm.CheckExtension(kvm.CapAdjustClock)
	if err != nil {
		return err
	}
	clock := c.KVM
	const realtime = kvm.ClockRealtime
	if clock.Flags&realtime != 0 && uint32(known)&realtime != 0 && c.passed(int64(clock.Realtime), now) > 0 {
		clock.Realtime += uint64(c.skew) // the kernel compares it with its own
		return m.kernel.vm.SetClock(clock)
	}
	clock.Flags = 0
	clock.Clock += uint64(c.passed(c.KVMRealtime, now))
	return m.kernel.vm.SetClock(clock)
}

// loadTSC sets the TSC of every vCPU, and makes sure that none has gone back.
func (m *Machine) loadTSC(s *machineState) error {
	c := &s.Clock
	if khz := m.spec.TSCKHz; !sameFrequency(c.TSCKHz, khz) {
		return fmt.Errorf("machine state: the TSC runs at %d kHz, the machine was described with %d kHz", c.TSCKHz, khz)
	}
	here, err := tscOffset(m.vcpus[0].kvm)
	if err != nil {
		return err
	}
	saved := make([]uint64, 0, len(s.VCPUs))
	for _, v := range s.VCPUs {
		if v.TSCOffset != nil {
			saved = append(saved, *v.TSCOffset)
		}
	}
	known := len(saved) == len(s.VCPUs)
	if here == nil || !known {
		saved = make([]uint64, len(s.VCPUs)) // all in step
	}
	if here == nil {
		err = m.writeTSC(c)
	} else {
		base := saved[0]
		if !known || !c.sameBoot() {
			base, err = m.baseOffset(c, *here)
		}
		if err == nil {
			err = m.setOffsets(base, saved)
		}
	}
	if errors.Is(err, errors.ErrUnsupported) {
		// A KVM whose guests see the host's TSC as it is. Here it steps forward;
		// a step back is found below.
		m.log.Warn("the guest's TSC jumps forward", "err", err)
	} else if err != nil {
		return err
	}
	for i, v := range m.vcpus {
		now, err := guestTSC(v.kvm)
		if err != nil {
			return err
		}
		if was := c.TSC + saved[i] - saved[0]; int64(now-was) < 0 {
			return fmt.Errorf("vCPU %d: the guest's TSC is at %d, here it would go back to %d, and this host's KVM cannot set it", i, was, now)
		}
	}
	return nil
}

// baseOffset returns the offset with which vCPU 0's TSC goes on with real time;
// here is the one that it has.
func (m *Machine) baseOffset(c *clockState, here uint64) (uint64, error) {
	tsc, now, err := sample(func() (uint64, error) { return guestTSC(m.vcpus[0].kvm) })
	return here + c.tscAt(now) - tsc, err
}

// setOffsets sets the offset of vCPU 0 to base, and keeps the differences that the
// guest has made between its TSCs.
func (m *Machine) setOffsets(base uint64, saved []uint64) error {
	for i, v := range m.vcpus {
		if err := v.kvm.SetTSCOffset(base + saved[i] - saved[0]); err != nil {
			return err
		}
	}
	return nil
}

// tscAt returns what vCPU 0's TSC should show at a moment.
func (c *clockState) tscAt(now int64) uint64 {
	const msec = uint64(time.Millisecond)
	passed := uint64(c.passed(c.TSCRealtime, now))
	return c.TSC + passed/msec*c.TSCKHz + passed%msec*c.TSCKHz/msec
}

// writeTSC is for a kernel before 5.16. Such a kernel takes a value within a second
// of the one written last, to any vCPU, to mean the same time, so that the TSCs
// stay in step. What was written last is that of a new vCPU, so a value far from
// both comes first.
func (m *Machine) writeTSC(c *clockState) error {
	const minute = 60_000 // milliseconds
	far := []kvm.MSR{{Index: cpu.MSRTSC, Data: c.tscAt(time.Now().UnixNano()) + minute*c.TSCKHz}}
	if _, err := m.vcpus[0].kvm.SetMSRs(far); err != nil {
		return err
	}
	for _, v := range m.vcpus {
		if _, err := v.kvm.SetMSRs([]kvm.MSR{{Index: cpu.MSRTSC, Data: c.tscAt(time.Now().UnixNano())}}); err != nil {
			return err
		}
	}
	return nil
}
