package balloon

import (
	"fmt"

	"github.com/govmm/govmm/internal/units"
)

// Rows returns the statistics that the guest gave, each with its name, for people.
func (s *Stats) Rows() (rows [][2]string) {
	for _, l := range []struct {
		name  string
		value *uint64
		count bool // not bytes
	}{
		{"total", s.Total, false},
		{"available", s.Available, false},
		{"free", s.Free, false},
		{"disk caches", s.DiskCaches, false},
		{"swapped in", s.SwapIn, false},
		{"swapped out", s.SwapOut, false},
		{"major faults", s.MajorFaults, true},
		{"minor faults", s.MinorFaults, true},
		{"huge pages", s.HugetlbAllocs, true},
		{"huge pages failed", s.HugetlbFailures, true},
	} {
		switch {
		case l.value == nil:
		case l.count:
			rows = append(rows, [2]string{l.name, fmt.Sprint(*l.value)})
		default:
			rows = append(rows, [2]string{l.name, units.Bytes(*l.value)})
		}
	}
	return rows
}
