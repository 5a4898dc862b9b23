// Package report has what the migration engine reports of itself: progress,
// results and predictions, in Go and as JSON, where durations are milliseconds. A
// program that only reads them needs nothing else of the engine.
package report

import "time"

// Phase is where an outgoing migration stands.
type Phase string

// The phases, in order; one of the last three ends a migration.
const (
	PhaseConnecting     Phase = "connecting"      // dialling, hello
	PhaseSetup          Phase = "setup"           // the destination builds the machine
	PhaseDisks          Phase = "disks"           // disks are copied, the guest runs
	PhasePrecopy        Phase = "precopy"         // rounds, the guest runs
	PhaseSwitchover     Phase = "switchover"      // the guest stands still
	PhaseHandoffUnknown Phase = "handoff-unknown" // COMMIT may have arrived, no verdict
	PhaseSaving         Phase = "saving"          // of a snapshot: what was sent is made durable
	PhasePostcopy       Phase = "postcopy"        // the guest runs at the destination, and lacks memory that is here
	PhaseCompleted      Phase = "completed"
	PhaseFailed         Phase = "failed"
	PhaseCancelled      Phase = "cancelled"
)

// Ended says whether nothing more will happen.
func (p Phase) Ended() bool {
	return p == PhaseCompleted || p == PhaseFailed || p == PhaseCancelled
}

// Reason says in one of a few words why a migration did not complete.
type Reason string

// The reasons. A later version may have more of them.
const (
	ReasonInvalid        Reason = "invalid"          // the options make no sense, or not for this machine
	ReasonUnreachable    Reason = "unreachable"      // no connection to the destination, or none by TLS
	ReasonRefused        Reason = "refused"          // the destination does not take the guest
	ReasonCancelled      Reason = "cancelled"        // by a user, or as the VM was to end
	ReasonTimeout        Reason = "timeout"          // it took longer than was allowed
	ReasonNotConverged   Reason = "not-converged"    // the guest writes faster than the link carries
	ReasonGuestEnded     Reason = "guest-ended"      // it powered off or crashed meanwhile
	ReasonLost           Reason = "destination-lost" // the connection broke, or the destination was silent
	ReasonGaveUp         Reason = "destination-failed"
	ReasonProtocol       Reason = "protocol"        // the destination said what is not allowed
	ReasonHandoffUnknown Reason = "handoff-unknown" // it is not known who runs the guest
	ReasonSource         Reason = "source-failed"   // anything else, at the source
)

// Reasons are all reasons.
func Reasons() []Reason {
	return []Reason{ReasonInvalid, ReasonUnreachable, ReasonRefused, ReasonCancelled, ReasonTimeout, ReasonNotConverged, ReasonGuestEnded,
		ReasonLost, ReasonGaveUp, ReasonProtocol, ReasonHandoffUnknown, ReasonSource}
}

// Progress is a snapshot of a migration under way.
type Progress struct {
	Phase            Phase    `json:"phase"`
	Address          string   `json:"address"`
	Round            int      `json:"round"`
	Channels         int      `json:"channels"` // data connections
	RAMBytes         uint64   `json:"ram_bytes"`
	BytesSent        uint64   `json:"bytes_sent"`
	ChannelBytes     []uint64 `json:"channel_bytes,omitempty"` // of BytesSent, by data connection
	CompressionRatio float64  `json:"compression_ratio"`       // see Result
	RemainingBytes   uint64   `json:"remaining_bytes"`
	// Of disks that are copied: their size, the content that was sent, and what is left.
	DiskBytes          uint64        `json:"disk_bytes,omitempty"`
	DiskBytesSent      uint64        `json:"disk_bytes_sent,omitempty"`
	DiskRemainingBytes uint64        `json:"disk_remaining_bytes,omitempty"`
	BandwidthBytes     uint64        `json:"bandwidth_bytes"`  // a second, measured over the last rounds
	DirtyRateBytes     uint64        `json:"dirty_rate_bytes"` // a second, measured over the last round
	EstimatedDowntime  time.Duration `json:"estimated_downtime_ms"`
	ThrottlePercent    int           `json:"throttle_percent"` // of the vCPUs' time
	Elapsed            time.Duration `json:"elapsed_ms" ms:"whole"`
	Error              string        `json:"error,omitempty"`
	Postcopy           *Postcopy     `json:"postcopy,omitempty"` // since the guest has moved, if memory came later
	ID                 string        `json:"id,omitempty"`
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
	Status           string        `json:"status"` // completed, failed, cancelled
	Error            string        `json:"error"`
	Reason           Reason        `json:"reason,omitempty"`    // why it did not complete
	FailedIn         Phase         `json:"failed_in,omitempty"` // the phase in which it failed, or was cancelled
	ID               string        `json:"id,omitempty"`
	Total            time.Duration `json:"total_ms" ms:"whole"` // from dialling to RUNNING
	Setup            time.Duration `json:"setup_ms" ms:"whole"` // from dialling to the first page
	Downtime         time.Duration `json:"downtime_ms"`
	DowntimeParts    Downtime      `json:"downtime"`
	DowntimeNote     string        `json:"downtime_note,omitempty"` // why Downtime exceeded 1.2 times the limit, if it did
	GuestResets      int           `json:"guest_resets"`            // of the guest, by itself, while it was moved
	StopsUndone      int           `json:"stops_undone"`            // the guest was stopped and ran on, as the rest would have taken too long, or did
	UndoneNote       string        `json:"undone_note,omitempty"`   // why the last of these stops was undone
	TrialStops       int           `json:"trial_stops"`             // the guest was stopped for a moment, to measure what a stop costs
	ThrottlePercent  int           `json:"throttle_percent"`        // the most by which the guest was slowed down
	BytesSent        uint64        `json:"bytes_sent"`
	RAMBytes         uint64        `json:"ram_bytes"`
	DiskBytes        uint64        `json:"disk_bytes,omitempty"`      // size of the disks that were copied
	DiskBytesSent    uint64        `json:"disk_bytes_sent,omitempty"` // content of disks that was sent
	PagesSent        uint64        `json:"pages_sent"`
	PagesZero        uint64        `json:"pages_zero"`
	PagesHole        uint64        `json:"pages_hole"`
	PagesHinted      uint64        `json:"pages_hinted"`            // each page once that a hint kept off the wire, and that was not written later
	HintsReceived    uint64        `json:"hints_received"`          // pages that the guest hinted, as often as it did
	HintsLate        uint64        `json:"hints_late"`              // of them those under an old id, or that had been sent
	HintsRewritten   uint64        `json:"hints_rewritten"`         // and those that the guest wrote after it was asked, so they were sent
	HintWait         time.Duration `json:"hint_wait_ms" ms:"whole"` // how long nothing was sent, for hints
	HintsOff         string        `json:"hints_off"`               // why the guest was not asked, or not any more
	Channels         int           `json:"channels"`                // data connections
	ChannelBytes     []uint64      `json:"channel_bytes"`           // what each of them sent
	Compression      string        `json:"compression"`
	CompressionRatio float64       `json:"compression_ratio"`  // length of page content before to after; 1 without compression
	Rounds           []RoundStats  `json:"rounds"`             // of more than 1000 the first and the last 500
	Postcopy         *Postcopy     `json:"postcopy,omitempty"` // nil: all memory moved before the guest
}

// Downtime says where the time went in which the guest stood still. The parts
// follow one another: their sum is [Result.Downtime].
type Downtime struct {
	Pause    time.Duration `json:"pause_ms"`     // until the last vCPU stands still and the devices are quiet
	LastSync time.Duration `json:"last_sync_ms"` // fetching the dirty log
	Pages    time.Duration `json:"pages_ms"`     // writing the last pages to the connections
	State    time.Duration `json:"state_ms"`     // saving the state, as far as the last pages did not hide it
	Storage  time.Duration `json:"storage_ms"`   // flushing the disks and comparing some of their blocks, as far as pages and state did not hide it
	Yield    time.Duration `json:"yield_ms"`     // flushing and unlocking the disks at the source
	Load     time.Duration `json:"load_ms"`      // loading the state, as the destination measured it
	Resume   time.Duration `json:"resume_ms"`    // from COMMIT to vCPUs that run, as the destination measured it
	Wire     time.Duration `json:"wire_ms"`      // the rest: bytes under way and two round trips
}

// Sum is the time of all parts together.
func (d Downtime) Sum() time.Duration {
	return d.Pause + d.LastSync + d.Pages + d.State + d.Storage + d.Yield + d.Load + d.Resume + d.Wire
}

// ReceiveProgress is a snapshot of what a destination has received.
type ReceiveProgress struct {
	Active        bool   `json:"active"`
	Peer          string `json:"peer"`
	BytesReceived uint64 `json:"bytes_received"`
	// Pages and blocks come in passes, from the first to the last, without what need not be sent.
	Pass        string `json:"pass,omitempty" enum:"memory,disks"` // what comes; empty: nothing yet
	PassBytes   uint64 `json:"pass_bytes,omitempty"`               // all of that
	PassedBytes uint64 `json:"passed_bytes,omitempty"`             // up to where it has come; it falls when a pass begins
}

// Estimate is what a migration is expected to take.
type Estimate struct {
	Converges      bool          `json:"converges"`      // rounds shrink until the downtime limit can be kept
	Note           string        `json:"note,omitempty"` // why they do not: Rounds and Total are up to where that was clear
	Rounds         int           `json:"rounds"`         // in which the guest runs
	Total          time.Duration `json:"total_ms"`
	Downtime       time.Duration `json:"downtime_ms"`
	BandwidthBytes uint64        `json:"bandwidth_bytes"` // a second, measured
	RTT            time.Duration `json:"rtt_ms"`          // a round trip, measured
	RAMBytes       uint64        `json:"ram_bytes"`       // all of the guest's memory
	DataBytes      uint64        `json:"data_bytes"`      // what of it is not zero
	DirtyRate      DirtyRate     `json:"dirty_rate"`
}

// DirtyRate is how a guest writes its memory. One that writes the same pages again
// and again has a lower rate the longer it is watched: the samples show that.
type DirtyRate struct {
	Interval       time.Duration `json:"interval_ms"` // what was measured
	Pages          uint64        `json:"pages"`       // different pages written within it
	RAMBytes       uint64        `json:"ram_bytes"`
	BytesPerSecond uint64        `json:"bytes_per_second"` // Pages over Interval
	Samples        []DirtySample `json:"samples"`          // they grow
}

// DirtySample says how many different pages had been written after a time.
type DirtySample struct {
	After time.Duration `json:"after_ms"`
	Pages uint64        `json:"pages"`
}
