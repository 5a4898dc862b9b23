package main

import (
	"fmt"
	"strings"

	"github.com/govmm/govmm/migrate"
)

// progressBar draws a bar of size characters and a percentage, in ASCII.
func progressBar(fraction float64, size int) string {
	fraction = min(max(fraction, 0), 1)
	full := int(fraction * float64(size))
	return fmt.Sprintf("[%s%s] %2d%%", strings.Repeat("#", full), strings.Repeat("-", size-full), int(fraction*100))
}

// fractionOf is how much of what a migration has to send, or has to send again, is there: of
// the disks while these are copied, and then of memory. It falls when a new round begins.
func fractionOf(p *migrate.Progress) float64 {
	left, all := p.RemainingBytes, p.RAMBytes
	switch p.Phase {
	case migrate.PhaseConnecting, migrate.PhaseSetup:
		return 0
	case migrate.PhaseDisks:
		left, all = p.DiskRemainingBytes, p.DiskBytes
	case migrate.PhaseSwitchover, migrate.PhaseHandoffUnknown, migrate.PhaseCompleted:
		return 1
	}
	if all == 0 {
		return 0
	}
	return 1 - float64(min(left, all))/float64(all)
}
