package main

import (
	"fmt"
	"strings"

	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/migrate"
)

// postcopyWarning is said before a guest may move without all of its memory.
const postcopyWarning = "postcopy: from when the guest moves until the last page has arrived it needs the processes of both hosts: if one of them ends, the guest is lost"

// postcopyLine is the live line while memory follows the guest.
func postcopyLine(p migrate.Progress) string {
	parts := []string{"postcopy", units.Bytes(p.RemainingBytes) + " left"}
	if l := p.Postcopy; l != nil {
		parts = append(parts, faultText(l))
	}
	if p.Error != "" {
		parts = append(parts, p.Error)
	}
	return strings.Join(parts, ", ")
}

// faultText says how the guest waited for its memory.
func faultText(l *migrate.Postcopy) string {
	s := fmt.Sprintf("%d faults", l.Faults)
	if l.Faults > 0 {
		s += fmt.Sprintf(" (p50 %s, p99 %s, longest %s)", formatMS(l.P50), formatMS(l.P99), formatMS(l.Longest))
	}
	return s
}

// postcopyText is the line about memory that came after the guest.
func postcopyText(l *migrate.Postcopy) string {
	s := fmt.Sprintf("postcopy: %d pages came after the guest, within %s; %s, %d answered at the destination", l.Pages, formatMS(l.Duration), faultText(l), l.Local)
	for i, ms := range l.VCPUs {
		if i == 0 {
			s += "; vCPUs stood still for"
		} else {
			s += ","
		}
		s += fmt.Sprintf(" %.1f", ms)
	}
	if len(l.VCPUs) > 0 {
		s += " ms"
	}
	if l.Recoveries > 0 {
		s += fmt.Sprintf("; connected again %d times", l.Recoveries)
	}
	return s
}
