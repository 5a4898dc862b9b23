package migrate

import (
	"slices"
	"sync"
	"time"

	"github.com/govmm/govmm/mempage"
)

// Phase is where an outgoing migration stands.
type Phase string

// The phases, in order; the last three and PhaseHandoffUnknown's outcome end a
// migration.
const (
	PhaseConnecting     Phase = "connecting"      // dialling, hello
	PhaseSetup          Phase = "setup"           // the destination builds the machine
	PhasePrecopy        Phase = "precopy"         // rounds, the guest runs
	PhaseSwitchover     Phase = "switchover"      // the guest stands still
	PhaseHandoffUnknown Phase = "handoff-unknown" // COMMIT may have arrived, no verdict
	PhaseCompleted      Phase = "completed"
	PhaseFailed         Phase = "failed"
	PhaseCancelled      Phase = "cancelled"
)

// Ended says whether nothing more will happen.
func (p Phase) Ended() bool {
	return p == PhaseCompleted || p == PhaseFailed || p == PhaseCancelled
}

// RoundStats is what one precopy round cost; the last round of a completed
// migration is the one in which the guest stood still.
type RoundStats struct {
	N           int           `json:"n"`
	Duration    time.Duration `json:"duration_ms" ms:"whole"`
	DirtyPages  uint64        `json:"dirty_pages"`  // pages to send when the round began
	PagesSent   uint64        `json:"pages_sent"`   // with their content
	PagesZero   uint64        `json:"pages_zero"`   // as a bit
	PagesHole   uint64        `json:"pages_hole"`   // not at all
	PagesHinted uint64        `json:"pages_hinted"` // hints took them out of what was to be sent
	BytesSent   uint64        `json:"bytes_sent"`   // on the wire, headers included
}

// Result is what a migration came to. In JSON, which `govmm migrate --json` prints,
// durations are milliseconds.
type Result struct {
	Status          string        `json:"status"` // completed, failed, cancelled
	Error           string        `json:"error"`
	Total           time.Duration `json:"total_ms" ms:"whole"` // from dialling to RUNNING
	Setup           time.Duration `json:"setup_ms" ms:"whole"` // from dialling to the first page
	Downtime        time.Duration `json:"downtime_ms"`
	DowntimeParts   Downtime      `json:"downtime"`
	DowntimeNote    string        `json:"downtime_note,omitempty"` // why Downtime exceeded 1.2 times the limit, if it did
	StopsUndone     int           `json:"stops_undone"`            // the guest was stopped and ran on, as more was left than the limit allows
	ThrottlePercent int           `json:"throttle_percent"`        // the most by which the guest was slowed down
	BytesSent       uint64        `json:"bytes_sent"`
	RAMBytes        uint64        `json:"ram_bytes"`
	PagesSent       uint64        `json:"pages_sent"`
	PagesZero       uint64        `json:"pages_zero"`
	PagesHole       uint64        `json:"pages_hole"`
	// PagesHinted are pages, each once, that a hint kept off the wire and that were
	// not written later. Holes are not counted.
	PagesHinted uint64 `json:"pages_hinted"`
	// HintsReceived are the pages that the guest hinted, as often as it named them;
	// HintsLate those under an old id, or of pages sent before; HintsRewritten those
	// of pages that were sent since the guest wrote them after it was asked.
	HintsReceived    uint64        `json:"hints_received"`
	HintsLate        uint64        `json:"hints_late"`
	HintsRewritten   uint64        `json:"hints_rewritten"`
	HintWait         time.Duration `json:"hint_wait_ms" ms:"whole"` // how long the first round waited for hints
	HintsOff         string        `json:"hints_off"`               // why the guest was not asked, or not any more
	Channels         int           `json:"channels"`                // data connections
	ChannelBytes     []uint64      `json:"channel_bytes"`           // what each of them sent
	Compression      Compression   `json:"compression"`
	CompressionRatio float64       `json:"compression_ratio"` // length of page content before to after; 1 without compression
	Rounds           []RoundStats  `json:"rounds"`            // of more than 1000 the first and the last 500
}

// maxRounds bounds Result.Rounds: rounds can be short, and a migration that
// does not converge goes on for an hour.
const maxRounds = 1000

// Progress is a snapshot of a migration under way.
type Progress struct {
	Phase             Phase         `json:"phase"`
	Address           string        `json:"address"`
	Round             int           `json:"round"`
	Channels          int           `json:"channels"` // data connections
	RAMBytes          uint64        `json:"ram_bytes"`
	BytesSent         uint64        `json:"bytes_sent"`
	ChannelBytes      []uint64      `json:"channel_bytes,omitempty"` // of BytesSent, by data connection
	CompressionRatio  float64       `json:"compression_ratio"`       // see Result
	RemainingBytes    uint64        `json:"remaining_bytes"`
	BandwidthBytes    uint64        `json:"bandwidth_bytes"`  // a second, measured over the last rounds
	DirtyRateBytes    uint64        `json:"dirty_rate_bytes"` // a second, measured over the last round
	EstimatedDowntime time.Duration `json:"estimated_downtime_ms"`
	ThrottlePercent   int           `json:"throttle_percent"` // of the vCPUs' time
	Elapsed           time.Duration `json:"elapsed_ms" ms:"whole"`
	Error             string        `json:"error,omitempty"`
}

// meter keeps the numbers of one migration.
type meter struct {
	mu       sync.Mutex // guards all below
	progress Progress
	result   Result
	round    RoundStats
	started  time.Time // dialling
	ended    time.Time
	roundAt  time.Time
	hints    uint64          // pages that hints took out since the round before ended
	wire     func() uint64   // bytes written to the connections
	wireAt   uint64          // wire() when the round began
	channels func() []uint64 // bytes written to each data connection; nil: there is none yet
	// Of pages sent with their content while compression was on: their length,
	// and what went on the wire for them.
	plainBytes, packedBytes uint64
}

// compressionRatio needs mu.
func (m *meter) compressionRatio() float64 {
	if m.packedBytes == 0 {
		return 1
	}
	return float64(m.plainBytes) / float64(m.packedBytes)
}

// packed counts what the content of pages became on the wire.
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

func (m *meter) snapshot() Progress {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.progress
	if m.wire != nil {
		p.BytesSent = m.wire()
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

// span adds what one PAGES frame carried, and what it left out.
func (m *meter) span(data, zero, hole uint64) {
	m.update(func(m *meter) {
		m.round.PagesSent += data
		m.round.PagesZero += zero
		m.round.PagesHole += hole
		done := (data + zero + hole) * mempage.Size
		m.progress.RemainingBytes -= min(done, m.progress.RemainingBytes)
	})
}

// hinted counts pages that hints took out of what is to be sent; those that come
// between two rounds belong to the next one.
func (m *meter) hinted(pages uint64) {
	m.update(func(m *meter) {
		m.hints += pages
		m.progress.RemainingBytes -= min(pages*mempage.Size, m.progress.RemainingBytes)
	})
}

// dirtied counts pages that a fetch added to the round under way.
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

// closeRound files the round under way. mu is held.
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
	m.round, m.roundAt = RoundStats{}, time.Time{}
}

// finish closes a migration with its outcome; a round that failed half way is
// filed with what it did.
func (m *meter) finish(phase Phase, err error) {
	m.update(func(m *meter) {
		m.ended = time.Now()
		m.closeRound()
		m.progress.Phase = phase
		m.result.Status = string(phase)
		if err != nil {
			m.progress.Error = err.Error()
			m.result.Error = err.Error()
		}
		if !m.started.IsZero() && m.result.Total == 0 {
			m.result.Total = m.ended.Sub(m.started)
		}
		if m.wire != nil {
			n := m.wire()
			m.wire = func() uint64 { return n } // let go of the connections
		}
		if m.channels != nil {
			bytes := m.channels()
			m.channels = func() []uint64 { return slices.Clone(bytes) }
		}
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
	r.ChannelBytes = []uint64{}
	if m.channels != nil {
		r.ChannelBytes = m.channels()
	}
	r.CompressionRatio = m.compressionRatio()
	return r
}
