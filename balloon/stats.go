package balloon

import (
	"context"
	"encoding/binary"
	"sync"
	"time"

	"github.com/govmm/govmm/virtio"
)

// Stats is the guest's statistics of its memory, section 5.5.6.4. A field is nil if
// the guest did not send it. The guest can send any values.
type Stats struct {
	// At is when they arrived, by this host's clock.
	At time.Time `json:"at"`

	SwapIn          *uint64 `json:"swap_in_bytes,omitempty"`
	SwapOut         *uint64 `json:"swap_out_bytes,omitempty"`
	MajorFaults     *uint64 `json:"major_faults,omitempty"`
	MinorFaults     *uint64 `json:"minor_faults,omitempty"`
	Free            *uint64 `json:"free_bytes,omitempty"`
	Total           *uint64 `json:"total_bytes,omitempty"`
	Available       *uint64 `json:"available_bytes,omitempty"`
	DiskCaches      *uint64 `json:"disk_caches_bytes,omitempty"`
	HugetlbAllocs   *uint64 `json:"hugetlb_allocations,omitempty"`
	HugetlbFailures *uint64 `json:"hugetlb_failures,omitempty"`
}

// field is the field for a tag, or nil if the tag is unknown.
func (s *Stats) field(tag uint16) **uint64 {
	fields := [...]**uint64{
		&s.SwapIn, &s.SwapOut, &s.MajorFaults, &s.MinorFaults, &s.Free,
		&s.Total, &s.Available, &s.DiskCaches, &s.HugetlbAllocs, &s.HugetlbFailures,
	}
	if int(tag) >= len(fields) {
		return nil
	}
	return fields[tag]
}

const (
	// statBytes is the size of struct virtio_balloon_stat: a tag of 16 bits and
	// a value of 64, without padding.
	statBytes = 10
	// maxStats is how many are read of a buffer, more than there are tags.
	maxStats = 64
)

// parseStats reads the complete statistics in p.
func parseStats(p []byte) Stats {
	var s Stats
	for ; len(p) >= statBytes; p = p[statBytes:] {
		if f := s.field(binary.LittleEndian.Uint16(p)); f != nil {
			v := binary.LittleEndian.Uint64(p[2:])
			*f = &v
		}
	}
	return s
}

// statsBox serves the statistics queue and has the latest statistics. There is one
// buffer: the driver fills it and makes it available; the device keeps it, and
// gives it back to ask for new statistics.
type statsBox struct {
	mu      sync.Mutex // guards what follows
	last    Stats
	have    bool
	driver  bool          // there is a driver
	asked   bool          // the buffer is to be given back
	changed chan struct{} // closed when new statistics arrive, or the driver goes

	wake chan struct{}              // asked is set
	raw  [maxStats * statBytes]byte // belongs to the queue's task
}

// task serves q.
func (x *statsBox) task(q *virtio.Queue) virtio.Task {
	x.mu.Lock()
	x.driver, x.asked = true, false
	x.mu.Unlock()
	return virtio.Task{Servers: []virtio.Server{{Queue: q, Gather: x.take, Empty: x.request}}, Wake: x.wake}
}

// take reads a new buffer. A buffer that was kept is given back.
func (x *statsBox) take(chains []virtio.Chain, written []uint32) (int, error) {
	stats := parseStats(x.raw[:chains[len(chains)-1].ReadAt(x.raw[:], 0)])
	stats.At = time.Now()
	x.put(stats)
	clear(written)
	return len(chains) - 1, nil
}

// request gives the buffer back if new statistics are asked for.
func (x *statsBox) request(chains []virtio.Chain, written []uint32) int {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.asked {
		return virtio.Keep
	}
	x.asked = false
	clear(written)
	return len(chains)
}

func (x *statsBox) put(s Stats) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.last, x.have, x.asked = s, true, false
	close(x.changed)
	x.changed = make(chan struct{})
}

func (x *statsBox) forget() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.last, x.have, x.driver, x.asked = Stats{}, false, false, false
	close(x.changed)
	x.changed = make(chan struct{})
}

// Stats returns the latest statistics, and whether there are any.
func (b *Balloon) Stats() (Stats, bool) {
	b.stats.mu.Lock()
	defer b.stats.mu.Unlock()
	return b.stats.last, b.stats.have
}

// PollStats asks the guest for statistics and returns its answer. It fails with
// [ErrNoStats], or when ctx ends: a guest that is paused or busy does not answer.
func (b *Balloon) PollStats(ctx context.Context) (Stats, error) {
	x := &b.stats
	x.mu.Lock()
	driver, changed := x.driver, x.changed
	x.asked = driver
	x.mu.Unlock()
	if !driver {
		return Stats{}, ErrNoStats
	}
	select {
	case x.wake <- struct{}{}:
	default:
	}
	select {
	case <-changed:
	case <-ctx.Done():
		return Stats{}, context.Cause(ctx)
	}
	if s, ok := b.Stats(); ok {
		return s, nil
	}
	return Stats{}, ErrNoStats
}
