package balloon

import (
	"context"
	"encoding/binary"
	"sync"
	"time"

	"github.com/govmm/govmm/virtio"
)

// Stats is what the guest says of its memory, section 5.5.6.4. A nil field is
// one that it did not give. All is the guest's word and may be anything.
type Stats struct {
	// At is when they came, by this host's clock.
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

// field is where the value of a tag goes; nil for one that is not known.
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
	// statBytes is struct virtio_balloon_stat: a tag of 16 bits and a value of
	// 64, with nothing in between.
	statBytes = 10
	// maxStats is how many are looked at: a driver that has more to tell than
	// there are tags repeats itself.
	maxStats = 64
)

// parseStats reads as many statistics as there are whole ones.
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

// statsBox holds the statistics that came last.
type statsBox struct {
	mu      sync.Mutex // guards what follows
	last    Stats
	have    bool
	changed chan struct{} // closed when others come, or the driver goes
	server  *statsServer  // nil when there is no driver
}

func (x *statsBox) put(s Stats) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.last, x.have = s, true
	close(x.changed)
	x.changed = make(chan struct{})
}

func (x *statsBox) forget() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.last, x.have, x.server = Stats{}, false, nil
	close(x.changed)
	x.changed = make(chan struct{})
}

// Stats returns the statistics that the guest gave last, and whether it has
// given any.
func (b *Balloon) Stats() (Stats, bool) {
	b.statsBox.mu.Lock()
	defer b.statsBox.mu.Unlock()
	return b.statsBox.last, b.statsBox.have
}

// PollStats asks the guest for statistics and returns its answer. It fails with
// [ErrNoStats], or when ctx ends: a guest that is paused, or busy, does not
// answer.
func (b *Balloon) PollStats(ctx context.Context) (Stats, error) {
	x := &b.statsBox
	x.mu.Lock()
	server, changed := x.server, x.changed
	x.mu.Unlock()
	if server == nil {
		return Stats{}, ErrNoStats
	}
	if err := server.loop.ask(ctx, server.request); err != nil {
		return Stats{}, err
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

// statsServer serves the statistics queue. There is one buffer: the driver
// fills it and makes it available, the device keeps it, and gives it back when
// it wants to have new ones.
type statsServer struct {
	b    *Balloon
	n    virtio.Notifier
	loop *loop

	// The rest is the goroutine's.
	chains [2]virtio.Chain
	at     int  // the one of chains that is held, or was
	held   bool // read and kept
	raw    [maxStats * statBytes]byte
}

func startStats(b *Balloon, q *virtio.Queue, n virtio.Notifier) *statsServer {
	s := &statsServer{b: b, n: n}
	s.loop = &loop{queue: q, kicked: s.take, quiet: s.putBack, ended: s.drop}
	s.loop.start()
	b.statsBox.mu.Lock()
	b.statsBox.server = s
	b.statsBox.mu.Unlock()
	return s
}

// take reads the buffer that has come. If there still is one, that goes back.
func (s *statsServer) take() {
	for range queueSize {
		c := &s.chains[1-s.at]
		ok, err := s.loop.queue.Next(c)
		if err != nil {
			s.n.NeedsReset(err)
			return
		}
		if !ok {
			return
		}
		s.request()
		s.at, s.held = 1-s.at, true
		stats := parseStats(s.raw[:c.ReadAt(s.raw[:], 0)])
		stats.At = time.Now()
		s.b.statsBox.put(stats)
	}
	// More buffers than a driver may have: look for other work in between.
	s.loop.queue.Signal()
}

// request gives the buffer back, which asks the driver to fill it again. If
// there is none, the driver is about to send it, or has never sent one.
func (s *statsServer) request() {
	if !s.held {
		return
	}
	s.held = false
	if err := s.loop.queue.Done(&s.chains[s.at], 0); err != nil {
		s.n.NeedsReset(err)
		return
	}
	s.loop.queue.Notify()
}

// putBack leaves the buffer in the queue, so that the device finds it again
// after a pause, on this host or on another.
func (s *statsServer) putBack() {
	if !s.held {
		return
	}
	s.held = false
	if err := s.loop.queue.Rewind(&s.chains[s.at]); err != nil {
		s.n.NeedsReset(err)
	}
}

// drop lets go of the buffer: the driver has reset the queue.
func (s *statsServer) drop() {
	if s.held {
		s.held = false
		// The only error is of a chain that is not out.
		_ = s.loop.queue.Drop(&s.chains[s.at])
	}
}
