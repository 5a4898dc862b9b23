// Package migrate moves a running virtual machine from one process to another
// over TCP: precopy rounds while the guest runs, a short stop, a handoff after
// which exactly one side may run.
//
// The package knows neither KVM nor the machine. It declares what it consumes
// ([RAM], [DirtyLog], [Source], [Builder], [Target]) and the same engine runs
// over real KVM and over the simulated one of its tests.
//
// The way of a page: the tracker says that it must be sent and arms its write
// tracking; the sender looks whether it is a hole or all zeros; one vectored
// write takes it from guest memory to the socket; at the destination one read
// takes it from the socket into guest memory. docs/migration.md has the
// invariants (R1 to R6), the byte table and the handoff.
package migrate

import (
	"context"
	"errors"
)

// Slot is one KVM memory slot: a run of guest physical pages that is
// contiguous in guest physical and in host virtual memory. A slot is named by
// its index in [RAM.Slots].
type Slot struct {
	GPA   uint64 // guest physical address of the first page, in bytes
	Pages uint64 // length in pages
}

// RAM is the guest's memory as the engine sees it. Page numbers count from the
// start of the slot. Methods may be called while vCPUs run.
type RAM interface {
	// Slots lists the memory slots; the list does not change.
	Slots() []Slot
	// Bytes returns the memory of pages [first, first+n) of a slot itself, not
	// a copy. It panics if the range is not inside the slot: the engine
	// validates before it asks.
	Bytes(slot int, first, n uint64) []byte
	// Populated sets bit i of bitmap where page first+i may hold data, and
	// clears it where that page is a hole: never populated, or punched out, so
	// that it reads as zero. It must not populate anything. Backings that
	// cannot tell report every page as populated. bitmap has at least
	// ceil(n/64) words; bits from n on are left clear.
	Populated(slot int, first, n uint64, bitmap []uint64) error
	// Zero makes pages [first, first+n) read as zero and gives their memory
	// back where the backing allows it.
	Zero(slot int, first, n uint64) error
}

// DirtyLog is the record of writes to a [RAM]: KVM's own log, which knows what
// vCPUs and the kernel wrote, and the VMM's, which knows what devices and
// loaders wrote. Bitmaps have one bit a page, bit 0 of word 0 first.
type DirtyLog interface {
	// StartDirtyLog turns write tracking on for every slot. Afterwards the log
	// of a slot may report no page or every page
	// (KVM_DIRTY_LOG_INITIALLY_SET).
	StartDirtyLog() error
	// StopDirtyLog turns it off. It may be called when it is off.
	StopDirtyLog() error
	// FetchDirtyLog stores KVM's log of the slot in bitmap, which covers the
	// whole slot (KVM_GET_DIRTY_LOG). With manual protection it clears
	// nothing; without, it clears and re-arms what it reports.
	FetchDirtyLog(slot int, bitmap []uint64) error
	// ClearDirtyLog clears the bits that are set in bitmap, whose bit 0 is
	// page first, from the log and tracks those pages' writes again
	// (KVM_CLEAR_DIRTY_LOG). first is a multiple of 64; n is too, unless the
	// range ends at the slot's end. Not called without manual protection.
	ClearDirtyLog(slot int, first, n uint64, bitmap []uint64) error
	// ManualProtect says whether the kernel leaves clearing to
	// ClearDirtyLog (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
	ManualProtect() bool
	// FetchVMMDirty atomically takes the VMM's own bits of the slot: they are
	// stored in bitmap and are clear afterwards. The VMM sets a bit after the
	// bytes have landed and before the guest can learn of them.
	FetchVMMDirty(slot int, bitmap []uint64) error
}

// Source is a machine that can be sent.
type Source interface {
	RAM
	DirtyLog
	// MigrationConfig describes the machine in the VMM's own encoding: all
	// that [Builder.Build] needs to make its twin.
	MigrationConfig() ([]byte, error)
	// PauseForHandoff stops the vCPUs, lets each complete a pending port or
	// MMIO access (which may write RAM), and quiets the devices with their
	// I/O drained. When it returns nothing writes guest memory any more.
	// wasRunning is false if the guest was paused before.
	PauseForHandoff(ctx context.Context) (wasRunning bool, err error)
	// YieldForHandoff gives up what only the side that runs the guest may hold,
	// locks on disks. It is called after PREPARED and before COMMIT, with the
	// machine stopped; if it fails the migration does.
	YieldForHandoff(ctx context.Context) error
	// ResumeAfterAbort undoes PauseForHandoff and YieldForHandoff: a guest that
	// ran, runs again.
	ResumeAfterAbort(ctx context.Context) error
	// SaveState returns the state of every device and vCPU. Called while the
	// machine is stopped.
	SaveState(ctx context.Context) ([]byte, error)
}

// Builder makes the destination's machine.
type Builder interface {
	// Build makes a machine from the source's configuration; the machine does
	// not run. It lists every incompatibility it finds: an error that has
	// `Unwrap() []error` (errors.Join) is sent to the source as a list.
	Build(ctx context.Context, config []byte) (Target, error)
}

// Target is a machine that is being received.
type Target interface {
	RAM
	// Prefault populates pages [first, first+n), whose content stays as it is:
	// zero, for a hole. It returns when that is done, and may be called while
	// other pages are written. An error says that it cannot be done here;
	// pages may have been populated all the same.
	Prefault(slot int, first, n uint64) error
	// PrepareState does what can be done of LoadState without reading or
	// writing the guest's memory, some of which has not landed yet.
	PrepareState(state []byte) error
	// LoadState restores every device and vCPU. Called once, after the last
	// page has landed, with what PrepareState was called with; no vCPU has run.
	LoadState(ctx context.Context, state []byte) error
	// Start gives the machine the right to run: its vCPUs enter the guest, or
	// stay stopped when paused is true. An error means that no instruction of
	// the guest was executed.
	Start(ctx context.Context, paused bool) error
	// Discard frees a machine that never got the right to run.
	Discard() error
}

// Errors that callers can tell apart with errors.Is.
var (
	// ErrCancelled: the migration was cancelled at the source.
	ErrCancelled = errors.New("migration cancelled")
	// ErrRefused: the destination refused, with its reasons.
	ErrRefused = errors.New("refused by the destination")
	// ErrHandoffUnknown: COMMIT may have arrived and no verdict is known. The
	// guest stays paused at the source.
	ErrHandoffUnknown = errors.New("handoff unknown")
	// ErrProtocol: the peer sent something that the protocol does not allow.
	ErrProtocol = errors.New("protocol error")
)
