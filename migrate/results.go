package migrate

import "github.com/govmm/govmm/migrate/report"

// What the engine reports of itself: see package report.
type (
	Result          = report.Result
	RoundStats      = report.RoundStats
	Downtime        = report.Downtime
	Progress        = report.Progress
	Phase           = report.Phase
	ReceiveProgress = report.ReceiveProgress
	DirtyRate       = report.DirtyRate
	DirtySample     = report.DirtySample
	Estimate        = report.Estimate
)

// The phases of a migration.
const (
	PhaseConnecting     = report.PhaseConnecting
	PhaseSetup          = report.PhaseSetup
	PhasePrecopy        = report.PhasePrecopy
	PhaseSwitchover     = report.PhaseSwitchover
	PhaseHandoffUnknown = report.PhaseHandoffUnknown
	PhaseCompleted      = report.PhaseCompleted
	PhaseFailed         = report.PhaseFailed
	PhaseCancelled      = report.PhaseCancelled
)
