package machine

import (
	"fmt"
	"time"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/memory"
)

var _ migrate.Latecomer = (*Target)(nil)

// CheckMissing reports why this host cannot run a guest whose memory comes later. What it
// lacks a source may know: it is not about any file or amount of this host.
func (t *Target) CheckMissing() error {
	if err := memory.CheckMissing(t.spec.Backing); err != nil {
		return kind.Told(fmt.Errorf("a guest whose memory comes later cannot run here: %w", err))
	}
	return nil
}

// Drop forgets pages that will come later, see [migrate.Latecomer].
func (t *Target) Drop(slot int, pages []uint64) error { return t.mem.Drop(slot, pages) }

// Miss makes pages missing, see [migrate.Latecomer].
func (t *Target) Miss(missing [][]uint64, want func(slot int, first, n uint64)) (migrate.Missing, error) {
	x, err := t.mem.Miss(missing, want)
	if err != nil {
		return nil, err
	}
	return later{x, t.Machine}, nil
}

// later is what a machine's memory lacks.
type later struct {
	*memory.Missing
	machine *Machine // whose vCPUs wait
}

// Land brings pages, see [migrate.Missing].
func (l later) Land(slot int, first, n uint64, pages []uint64, content []byte) error {
	if content == nil {
		return l.LandZero(slot, first, n, pages)
	}
	return l.Missing.Land(slot, first, pages, content[:n*mempage.Size])
}

// Stalls says how long threads have waited for pages.
func (l later) Stalls() migrate.Stalls {
	s := l.Missing.Stalls()
	out := migrate.Stalls{Faults: s.Faults, Local: s.Local, P50: s.Quantile(.5), P99: s.Quantile(.99), Longest: s.Longest, Total: s.Total, Left: l.Left()}
	for _, c := range l.machine.vcpus {
		out.PerVCPU = append(out.PerVCPU, s.Threads[uint32(c.kvm.ThreadID())])
	}
	if n, since := l.Waiting(); n > 0 {
		out.WaitingSince = time.Since(since)
	}
	if err := l.Err(); err != nil {
		out.Failed = err.Error()
	}
	return out
}

// MissingPages is how many pages of the guest's memory have not come from where it came
// from.
func (m *Machine) MissingPages() uint64 {
	if x := m.mem.Missing(); x != nil {
		return x.Left()
	}
	return 0
}

// Whole returns a channel that is closed when no memory of the guest is missing, and no
// thread of this process waits for any in the kernel.
func (m *Machine) Whole() <-chan struct{} {
	if x := m.mem.Missing(); x != nil {
		return x.Gone()
	}
	return whole
}

var whole = func() chan struct{} { c := make(chan struct{}); close(c); return c }()
