package migrate

import "github.com/govmm/govmm/migrate/report"

type (
	Result          = report.Result          // what a migration came to
	RoundStats      = report.RoundStats      // of one round
	Downtime        = report.Downtime        // the parts of a downtime
	Progress        = report.Progress        // of a migration under way
	Phase           = report.Phase           // of a migration
	ReceiveProgress = report.ReceiveProgress // of a [Receiver]
	DirtyRate       = report.DirtyRate       // how a guest writes its memory
	DirtySample     = report.DirtySample     // of a [DirtyRate]
	Postcopy        = report.Postcopy        // what came of memory that moved after the guest
	Estimate        = report.Estimate        // what a migration is expected to take
	Reason          = report.Reason          // why a migration did not complete
)

// The phases of a migration.
const (
	PhaseConnecting     = report.PhaseConnecting
	PhaseSetup          = report.PhaseSetup
	PhaseDisks          = report.PhaseDisks
	PhasePrecopy        = report.PhasePrecopy
	PhaseSwitchover     = report.PhaseSwitchover
	PhaseHandoffUnknown = report.PhaseHandoffUnknown
	PhaseSaving         = report.PhaseSaving
	PhasePostcopy       = report.PhasePostcopy
	PhaseCompleted      = report.PhaseCompleted
	PhaseFailed         = report.PhaseFailed
	PhaseCancelled      = report.PhaseCancelled
)
