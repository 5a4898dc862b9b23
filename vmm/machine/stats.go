package machine

import (
	"strings"
	"sync/atomic"
	"time"

	"github.com/govmm/govmm/kvm"
	"golang.org/x/sys/unix"
)

// exitKinds bounds the exit reasons that are told apart: KVM has 42 of them.
const exitKinds = 48

// exitCounts count why a vCPU's thread left the guest. Only that thread writes them.
type exitCounts struct {
	reasons [exitKinds]atomic.Uint64
	kicked  atomic.Uint64 // by a signal: to pause it, for example
}

func (e *exitCounts) count(r kvm.ExitReason) { e.reasons[min(r, exitKinds-1)].Add(1) }

// VCPUStats is what a vCPU has done since its machine was made, at the last reset.
type VCPUStats struct {
	Time  time.Duration     // of its thread, in the guest and for it; 0 after its end
	Exits map[string]uint64 // by reason: "io", "mmio", ...; "signal"
}

// VCPUs returns what each vCPU has done. It does not stop them.
func (m *Machine) VCPUs() []VCPUStats {
	all := make([]VCPUStats, len(m.vcpus))
	for i, c := range m.vcpus {
		exits := map[string]uint64{"signal": c.exits.kicked.Load()}
		for r := range c.exits.reasons {
			if n := c.exits.reasons[r].Load(); n != 0 {
				exits[strings.ToLower(strings.TrimPrefix(kvm.ExitReason(r).String(), "KVM_EXIT_"))] += n
			}
		}
		all[i] = VCPUStats{Time: threadTime(int(c.thread.Load())), Exits: exits}
	}
	return all
}

// threadTime is the processor time of a thread of this process.
func threadTime(id int) time.Duration {
	if id == 0 {
		return 0
	}
	const perThread, scheduler = 4, 2 // CPUCLOCK_PERTHREAD_MASK, CPUCLOCK_SCHED, linux/posix-timers.h
	var t unix.Timespec
	if unix.ClockGettime(int32(^id)<<3|perThread|scheduler, &t) != nil {
		return 0 // it has ended
	}
	return time.Duration(t.Nano())
}
