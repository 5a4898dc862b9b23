package migrate

import (
	"slices"
	"sync"
	"time"

	"github.com/govmm/govmm/mempage"
)

// maxRounds bounds Result.Rounds: rounds can be short, and a migration that does not
// converge may go on for an hour.
const maxRounds = 1000

// meter keeps the numbers of one migration.
type meter struct {
	mu       sync.Mutex // guards all below
	progress Progress
	result   Result
	round    RoundStats
	started  time.Time // dialling
	ended    time.Time
	roundAt  time.Time
	hints    uint64          // pages that hints took out since the last round ended
	wire     func() uint64   // bytes written to the connections
	wireAt   uint64          // wire() when the round began
	later    *meterPostcopy  // nil: no memory came later
	wireWas  uint64          // bytes that earlier sessions have sent
	notify   func(Notice)    // nil: nobody is told
	channels func() []uint64 // bytes written to each data connection; nil: there is none yet
	// With compression: the length of page content, and of what was sent for it.
	plainBytes, packedBytes uint64
}

// compressionRatio needs mu.
func (m *meter) compressionRatio() float64 {
	if m.packedBytes == 0 {
		return 1
	}
	return float64(m.plainBytes) / float64(m.packedBytes)
}

// packed counts page content and what was sent for it.
func (m *meter) packed(plain, packed uint64) {
	m.update(func(m *meter) {
		m.plainBytes += plain
		m.packedBytes += packed
	})
}

func (m *meter) update(f func(*meter)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f(m)
}

// onWire sets what counts the bytes that this session has written.
func (m *meter) onWire(sent func() uint64) {
	m.update(func(m *meter) {
		was := m.wireWas
		m.wire = func() uint64 { return was + sent() }
	})
}

// again is called before another session: what the last one did still counts.
func (m *meter) again() {
	m.update(func(m *meter) {
		m.closeRound()
		if m.wire != nil {
			m.wireWas = m.wire()
		}
		m.channels = nil
	})
}

func (m *meter) snapshot() Progress {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.progress
	if m.wire != nil {
		p.BytesSent = m.wire()
	}
	if m.later != nil {
		p.BytesSent += m.later.bytes
	}
	if m.channels != nil {
		p.ChannelBytes = m.channels()
	}
	p.CompressionRatio = m.compressionRatio()
	if end := m.ended; !m.started.IsZero() {
		if end.IsZero() {
			end = time.Now()
		}
		p.Elapsed = end.Sub(m.started)
	}
	return p
}

func (m *meter) beginRound(n int, dirty uint64) {
	m.update(func(m *meter) {
		m.round = RoundStats{N: n, DirtyPages: dirty}
		m.roundAt = time.Now()
		m.wireAt = m.wire()
		m.progress.Round = n
		m.progress.RemainingBytes = dirty * mempage.Size
	})
}

// span counts the pages of one span.
func (m *meter) span(data, zero, hole uint64) {
	m.update(func(m *meter) {
		m.round.PagesSent += data
		m.round.PagesZero += zero
		m.round.PagesHole += hole
		done := (data + zero + hole) * mempage.Size
		m.progress.RemainingBytes -= min(done, m.progress.RemainingBytes)
	})
}

// hinted counts pages that hints took out of what is to be sent. Those between two
// rounds belong to the next one.
func (m *meter) hinted(pages uint64) {
	m.update(func(m *meter) {
		m.hints += pages
		m.progress.RemainingBytes -= min(pages*mempage.Size, m.progress.RemainingBytes)
	})
}

// dirtied counts pages that a fetch added to the current round.
func (m *meter) dirtied(pages uint64) {
	m.update(func(m *meter) {
		m.round.DirtyPages += pages
		m.progress.RemainingBytes += pages * mempage.Size
	})
}

// endRound closes the round and returns what it moved and how long it took.
func (m *meter) endRound() (stats RoundStats, d time.Duration) {
	m.update(func(m *meter) {
		d = time.Since(m.roundAt)
		stats = m.round
		m.closeRound()
	})
	return stats, d
}

// closeRound adds the current round to the result. It needs mu.
func (m *meter) closeRound() {
	if m.roundAt.IsZero() {
		return
	}
	m.round.Duration = time.Since(m.roundAt)
	m.round.BytesSent = m.wire() - m.wireAt
	m.round.PagesHinted, m.hints = m.hints, 0
	r := &m.result
	r.PagesSent += m.round.PagesSent
	r.PagesZero += m.round.PagesZero
	r.PagesHole += m.round.PagesHole
	if len(r.Rounds) == maxRounds {
		r.Rounds = slices.Delete(r.Rounds, maxRounds/2, maxRounds/2+1)
	}
	r.Rounds = append(r.Rounds, m.round)
	m.tell(Notice{Phase: m.progress.Phase, Round: m.round})
	m.round, m.roundAt = RoundStats{}, time.Time{}
}

// finish records the outcome. A round that failed is added with what it did.
func (m *meter) finish(phase Phase, err error) {
	m.update(func(m *meter) {
		m.ended = time.Now()
		m.closeRound()
		if err != nil {
			m.progress.Error = err.Error()
			m.result.Error = err.Error()
			m.result.Reason, m.result.FailedIn = reasonFor(err, m.progress.Phase), m.progress.Phase
		}
		m.progress.Phase = phase
		m.result.Status = string(phase)
		if !m.started.IsZero() && m.result.Total == 0 {
			m.result.Total = m.ended.Sub(m.started)
		}
		if m.wire != nil {
			n := m.wire()
			m.wire = func() uint64 { return n } // drop the connections
		}
		if m.channels != nil {
			bytes := m.channels()
			m.channels = func() []uint64 { return slices.Clone(bytes) }
		}
		m.tell(Notice{Phase: phase, Reason: m.result.Reason, Error: m.result.Error})
	})
}

func (m *meter) snapshotResult() Result {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.result
	r.Rounds = append([]RoundStats{}, m.result.Rounds...)
	if m.wire != nil {
		r.BytesSent = m.wire()
	}
	if m.later != nil {
		r.BytesSent += m.later.bytes
	}
	r.ChannelBytes = []uint64{}
	if m.channels != nil {
		r.ChannelBytes = m.channels()
	}
	r.CompressionRatio = m.compressionRatio()
	return r
}
