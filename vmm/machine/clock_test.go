package machine

import (
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/bootid"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/kvm"
)

// setsTSC says whether this KVM can set a guest's TSC. One without hardware support
// shows guests the TSC of the host.
func setsTSC(t *testing.T) bool {
	t.Helper()
	m := newMachine(t, 1, vmtest.JustCount, nil)
	err := m.vcpus[0].kvm.SetTSCOffset(1 << 40)
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		t.Fatal(err)
	}
	return err == nil
}

func TestTSCAt(t *testing.T) {
	c := clockState{TSC: 1000, TSCRealtime: 5e9, TSCKHz: 2_599_998}
	for now, want := range map[int64]uint64{
		5e9:                         1000,
		5e9 + 1:                     1002,
		6e9:                         1000 + 2_599_998_000,
		5e9 + 599_999_999_999:       1000 + 1_559_998_799_997,
		5e9 - 1:                     1000, // the clocks disagree
		5e9 + int64(11*time.Minute): 1000,
	} {
		if got := c.tscAt(now); got != want {
			t.Errorf("at %d ns: %d, want %d", now-c.TSCRealtime, got, want)
		}
	}
}

// TestClocksGoOn loads a state in the boot in which it was saved, and as on another
// host, where TSC and kvmclock are different. In both cases the guest's clocks have
// advanced by the real time that has passed.
func TestClocksGoOn(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(*machineState)
	}{
		{"same boot", func(*machineState) {}},
		{"other host", func(s *machineState) {
			s.Clock.Boot = "another"
			s.Clock.TSC += 1 << 50
			for i := range s.VCPUs {
				*s.VCPUs[i].TSCOffset += 1 << 52
			}
		}},
		{"no offsets", func(s *machineState) {
			for i := range s.VCPUs {
				s.VCPUs[i].TSCOffset = nil
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine(t, 2, vmtest.JustCount, nil)
			s, err := m.saveState()
			check(t, err)
			if s.VCPUs[0].TSCOffset == nil {
				t.Skip("needs VT-x or SVM, or Linux 5.16: this KVM does not tell TSC offsets")
			}
			c.spoil(s)
			peer := fromSpec(t, m.Spec(), nil)
			time.Sleep(20 * time.Millisecond) // the time that a migration takes
			began := time.Now()
			err = peer.loadState(s)
			// Each clock is set at some moment of LoadState.
			most := 5*time.Millisecond + time.Since(began)
			if c.name == "other host" && !setsTSC(t) {
				// The guest's TSC is ahead of this host's.
				if err == nil || !strings.Contains(err.Error(), "it would go back to") {
					t.Errorf("a TSC that cannot be set: %v", err)
				}
				return
			}
			check(t, err)
			for _, v := range peer.vcpus {
				tsc, at, err := sample(func() (uint64, error) { return guestTSC(v.kvm) })
				check(t, err)
				// The MSR of a vCPU that has not run shows what was loaded.
				want := float64(s.Clock.TSC) + float64(at-s.Clock.TSCRealtime)*float64(s.Clock.TSCKHz)/1e6
				if off := time.Duration((float64(tsc) - want) / float64(s.Clock.TSCKHz) * 1e6); off.Abs() > most {
					t.Errorf("the TSC of vCPU %d is off by %v", v.kvm.ID(), off)
				}
			}
			clock, at, err := sample(peer.kernel.vm.GetClock)
			check(t, err)
			if off := time.Duration(int64(clock.Clock-s.Clock.KVM.Clock) - (at - s.Clock.KVMRealtime)); off.Abs() > most {
				t.Errorf("kvmclock is off by %v", off)
			}
		})
	}
}

// TestTSCIsWritten sets the TSC as on kernels that cannot set its offset. Such a kernel
// synchronises a TSC that is written with less than a second of difference.
func TestTSCIsWritten(t *testing.T) {
	m := newMachine(t, 2, vmtest.JustCount, nil)
	if !setsTSC(t) {
		t.Skip("needs VT-x or SVM: this KVM does not let TSCs be set")
	}
	for _, ahead := range []time.Duration{100 * time.Millisecond, time.Hour} {
		s, err := m.saveState()
		check(t, err)
		c := s.Clock
		c.TSC += uint64(ahead.Milliseconds()) * c.TSCKHz
		began := time.Now()
		check(t, m.writeTSC(&c))
		most := 5*time.Millisecond + time.Since(began)
		var each []uint64
		for _, v := range m.vcpus {
			tsc, at, err := sample(func() (uint64, error) { return guestTSC(v.kvm) })
			check(t, err)
			if off := time.Duration((float64(tsc) - float64(c.tscAt(at))) / float64(c.TSCKHz) * 1e6); off.Abs() > most {
				t.Errorf("%v ahead: the TSC of vCPU %d is off by %v", ahead, v.kvm.ID(), off)
			}
			offset, err := tscOffset(v.kvm)
			check(t, err)
			if offset != nil {
				each = append(each, *offset)
			}
		}
		if len(each) == 2 && each[0] != each[1] {
			t.Errorf("%v ahead: offsets %v, not in step", ahead, each)
		}
	}
}

// TestTSCsKeepTheirDistance: a difference that the guest has set between the TSCs of two
// vCPUs stays.
func TestTSCsKeepTheirDistance(t *testing.T) {
	for _, boot := range []string{bootid.ID(), "another"} {
		m := newMachine(t, 2, vmtest.JustCount, nil)
		if !setsTSC(t) {
			t.Skip("needs VT-x or SVM: this KVM does not let TSC offsets be set")
		}
		here, err := tscOffset(m.vcpus[0].kvm)
		check(t, err)
		check(t, m.vcpus[1].kvm.SetTSCOffset(*here+777777))
		s, err := m.saveState()
		check(t, err)
		s.Clock.Boot = boot
		peer := fromSpec(t, m.Spec(), nil)
		check(t, peer.loadState(s))
		first, err := tscOffset(peer.vcpus[0].kvm)
		check(t, err)
		second, err := tscOffset(peer.vcpus[1].kvm)
		check(t, err)
		if *second-*first != 777777 {
			t.Errorf("boot %q: the TSCs are %d apart", boot, *second-*first)
		}
		if boot == bootid.ID() && *first != *here {
			t.Errorf("in one boot the offset went from %d to %d", *here, *first)
		}
	}
}

// TestClockNeverGoesBack: the clocks do not go back where the real-time clocks of the
// two hosts disagree.
func TestClockNeverGoesBack(t *testing.T) {
	now := time.Now().UnixNano()
	for since, want := range map[int64]int64{
		now - 5: 5, now: 0, now + int64(time.Hour): 0, now - int64(time.Hour): 0,
		math.MinInt64: 0, math.MaxInt64: 0, 0: 0, -1: 0,
	} {
		if got := elapsed(since, now); got != want {
			t.Errorf("elapsed from %d: %d, want %d", since-now, got, want)
		}
	}
	m := newMachine(t, 1, vmtest.JustCount, nil)
	s, err := m.saveState()
	check(t, err)
	s.Clock.Boot = "another"
	s.Clock.TSCRealtime += int64(time.Hour)
	s.Clock.KVMRealtime += int64(time.Hour)
	s.Clock.KVM.Realtime = math.MaxUint64
	s.Clock.KVM.Flags |= kvm.ClockRealtime
	s.Clock.KVM.Clock += uint64(time.Hour)
	if setsTSC(t) {
		s.Clock.TSC += 1 << 50
	}
	peer := fromSpec(t, m.Spec(), nil)
	check(t, peer.loadState(s))
	tsc, err := guestTSC(peer.vcpus[0].kvm)
	check(t, err)
	clock, err := peer.kernel.vm.GetClock()
	check(t, err)
	if tsc < s.Clock.TSC || clock.Clock < s.Clock.KVM.Clock {
		t.Errorf("TSC %d, was %d; kvmclock %d, was %d", tsc, s.Clock.TSC, clock.Clock, s.Clock.KVM.Clock)
	}
}

// TestSkewBetweenHosts: however far the real-time clocks of two hosts are apart, a
// guest's clocks advance by what can have passed: no less than since the state came, no
// more than since the source was last told something that it waited for.
func TestSkewBetweenHosts(t *testing.T) {
	const least, most = 100 * time.Millisecond, 400 * time.Millisecond
	now := time.Now()
	w := window{after: now.Add(-most), before: now.Add(-least)}
	for _, real := range []time.Duration{least, 250 * time.Millisecond, most} {
		for _, skew := range []time.Duration{0, time.Millisecond, -time.Millisecond, time.Second, -time.Second, 9 * time.Minute, -9 * time.Minute, 1e6 * time.Hour, -1e6 * time.Hour} {
			c := clockState{TSCRealtime: now.Add(-real - skew).UnixNano(), saved: w}
			wrong := c.check(now)
			got := time.Duration(c.passed(c.TSCRealtime, now.UnixNano()))
			if got < least || got > most || wrong != (real+skew < least || real+skew > most) || !wrong && got != real+skew {
				t.Errorf("%v passed and the clocks differ by %v: taken for %v, clocks wrong: %v", real, skew, got, wrong)
			}
		}
	}
}

// TestSkewIsNotLoaded: TSC and kvmclock of a machine that is loaded on a host whose
// real-time clock is minutes ahead, or behind.
func TestSkewIsNotLoaded(t *testing.T) {
	for _, skew := range []time.Duration{-9 * time.Minute, 9 * time.Minute} {
		m := newMachine(t, 2, vmtest.JustCount, nil)
		s, err := m.saveState()
		check(t, err)
		s.Clock.Boot = "another"
		s.Clock.TSCRealtime -= int64(skew)
		s.Clock.KVMRealtime -= int64(skew)
		s.Clock.KVM.Realtime -= uint64(skew)
		began := time.Now()
		s.Clock.saved = window{after: began.Add(-time.Second), before: began}
		next := newMachine(t, 2, vmtest.JustCount, nil)
		check(t, next.loadState(s))
		most := time.Since(began) + time.Second
		k, err := next.kernel.vm.GetClock()
		check(t, err)
		if passed := time.Duration(k.Clock - s.Clock.KVM.Clock); passed < 0 || passed > most+time.Since(began) {
			t.Errorf("kvmclock advances by %v, with clocks that differ by %v", passed, skew)
		}
		if !setsTSC(t) {
			continue // it steps forward, as any guest's TSC on such a KVM
		}
		tsc, err := guestTSC(next.vcpus[0].kvm)
		check(t, err)
		if passed := time.Duration(float64(tsc-s.Clock.TSC) / float64(s.Clock.TSCKHz) * 1e6); passed < 0 || passed > most+time.Since(began) {
			t.Errorf("the TSC advances by %v, with clocks that differ by %v", passed, skew)
		}
	}
}

// TestKeptClocks: a guest that was kept in a snapshot, for days perhaps, goes on with the
// time that has passed since; a real-time clock that goes back, or was never set, says nothing.
func TestKeptClocks(t *testing.T) {
	const day = int64(24 * time.Hour)
	c := clockState{kept: true, TSC: 1000, TSCKHz: 2_000_000, TSCRealtime: 5 * day}
	for _, at := range []struct{ now, want int64 }{{5 * day, 0}, {5*day + 7, 7}, {8 * day, 3 * day}, {4 * day, 0}, {5*day + int64(maxKept) + 1, 0}} {
		if got := c.passed(c.TSCRealtime, at.now); got != at.want {
			t.Errorf("at %d: %d have passed, expected %d", at.now, got, at.want)
		}
		if got, want := c.tscAt(at.now), 1000+uint64(at.want)*2; got != want {
			t.Errorf("at %d: the TSC is %d, expected %d", at.now, got, want)
		}
	}
	if c.check(time.Unix(0, 100*day)) {
		t.Error("the clocks are taken to be wrong, since they are apart")
	}
}
