package report

import "time"

// Postcopy is what came of a guest that moved before all of its memory had.
type Postcopy struct {
	Pages       uint64        `json:"pages"`        // that were missing when the guest moved
	PagesWanted uint64        `json:"pages_wanted"` // of them those that were sent since somebody waited for them, or for a neighbour
	PagesRest   uint64        `json:"pages_rest"`   // and those that were sent since it was their turn
	Duration    time.Duration `json:"duration_ms"`  // from RUNNING until the last page had arrived
	Faults      uint64        `json:"faults"`       // of the destination's threads on missing pages
	Local       uint64        `json:"faults_local"` // on pages that are not missing and did not exist, answered there
	P50         time.Duration `json:"fault_p50_ms"` // from the fault until the page had arrived
	P99         time.Duration `json:"fault_p99_ms"`
	Longest     time.Duration `json:"fault_longest_ms"`
	Stalled     time.Duration `json:"stalled_ms"`                 // the sum of all faults
	VCPUs       []float64     `json:"stalled_vcpus_ms,omitempty"` // of them those of each vCPU
	Recoveries  int           `json:"recoveries"`                 // how often the destination was reached again
}

func (p Postcopy) MarshalJSON() ([]byte, error)  { return marshalMS(p) }
func (p *Postcopy) UnmarshalJSON(b []byte) error { return unmarshalMS(b, p) }

// Milliseconds are durations as JSON has them.
func Milliseconds(list []time.Duration) []float64 {
	var out []float64
	for _, d := range list {
		out = append(out, milliseconds(d))
	}
	return out
}
