// Package migrate moves a running virtual machine from one process to another:
// rounds of copying while the guest runs (precopy), a short stop, and a handoff
// after which exactly one side may run the guest.
//
// The destination serves connections with a [Receiver], whose [Builder] makes the
// machine. The source sends a machine with a [Migration]:
//
//	receiver := migrate.NewReceiver(builder, slog.Default())
//	go receiver.Serve(ctx, listener)
//	target := <-receiver.Arrived() // the guest runs here
//
//	m := migrate.New(source, "host:7777", migrate.Options{})
//	result, err := m.Run(ctx)
//
// After nil the guest runs at the destination, and must never run at the source
// again. After any error except [ErrHandoffUnknown] it goes on at the source.
//
// The engine knows neither KVM nor the machine: it uses the interfaces [RAM],
// [DirtyLog], [Source], [Builder] and [Target]. A net.Listener and [Options.Dial], or
// the address, connect the two sides, by TCP, a unix socket or in memory;
// [Options.TLS] and [Receiver.RequireTLS] secure that. Package simtest has a
// simulated machine.
//
// Comments cite the rules R1 to R6 of docs/migration.md, which also describes
// the bytes on the wire and the handoff.
package migrate

import (
	"context"
	"errors"
	"time"
)

// Errors for errors.Is.
var (
	ErrCancelled      = errors.New("migration cancelled")
	ErrRefused        = errors.New("refused by the destination") // the text has every reason
	ErrTimeout        = errors.New("migration timed out")
	ErrNotConverged   = errors.New("precopy did not converge")
	ErrProtocol       = errors.New("protocol error")  // the peer sent what the protocol does not allow
	ErrHandoffUnknown = errors.New("handoff unknown") // COMMIT may have arrived, and no verdict has come
	ErrTooLate        = errors.New("too late to cancel: the right to run has been handed over")
	ErrNoHintSource   = errors.New("the machine has no balloon") // so the guest cannot be asked for free pages
)

// Slot is one KVM memory slot, named by its index in [RAM.Slots].
type Slot struct {
	GPA   uint64 // guest physical address of the first page
	Pages uint64
}

// RAM is the guest's memory. Page numbers count from the start of the slot; in a
// bitmap bit 0 of word 0 is the first page. vCPUs may run during all calls.
type RAM interface {
	// Slots lists the memory slots by ascending address. The list does not change.
	Slots() []Slot
	// Bytes returns the memory of pages [first, first+n) itself, not a copy. It is called only for pages that exist.
	Bytes(slot int, first, n uint64) []byte
	// Populated sets bit i of bitmap if page first+i may hold data, and clears it if that page is a hole, which reads
	// as zero. It populates nothing. A backing that cannot tell reports every page. bitmap has ceil(n/64) words.
	Populated(slot int, first, n uint64, bitmap []uint64) error
	// Zero makes the pages read as zero, and gives their memory back where the backing allows it.
	Zero(slot int, first, n uint64) error
}

// HoleFinder is a [RAM] that finds large holes quickly.
type HoleFinder interface {
	// NextPopulated returns the first page of [first, first+n) that may hold data, as Populated reports it, or first+n if
	// there is none.
	NextPopulated(slot int, first, n uint64) (page uint64, err error)
}

// DirtyLog is the record of writes to a [RAM]: KVM's log, of what vCPUs and the
// kernel wrote, and the VMM's, of what devices and loaders wrote.
type DirtyLog interface {
	StartDirtyLog() error // for all slots; the log then reports no page of a slot, or every page (KVM_DIRTY_LOG_INITIALLY_SET)
	StopDirtyLog() error  // also if it is off; not called once the guest has moved away
	ManualProtect() bool  // KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
	// FetchDirtyLog stores KVM's log of the slot, every word of it (KVM_GET_DIRTY_LOG). With manual protection it clears nothing; without,
	// it clears and re-arms what it reports.
	FetchDirtyLog(slot int, bitmap []uint64) error
	// ClearDirtyLog clears the bits of bitmap, whose bit 0 is page first, from KVM's log and re-arms those pages
	// (KVM_CLEAR_DIRTY_LOG). first is a multiple of 64, and n too or it ends the slot. Only with manual protection.
	ClearDirtyLog(slot int, first, n uint64, bitmap []uint64) error
	// FetchVMMDirty takes the VMM's log of the slot, atomically, and calls each for every word that has bits: word is the
	// log of pages 64*w and following. The VMM sets a bit after the bytes have landed and before the guest can learn of
	// them.
	FetchVMMDirty(slot int, each func(w int, word uint64)) error
}

// BulkLog is a [DirtyLog] that can do for all slots at once, or avoid, what takes long in a large guest.
type BulkLog interface {
	DirtyLog
	// BeginSync comes before the slots of one sync are fetched, each at most once. What it collects, it collects for all
	// of them.
	BeginSync() error
	// TakeDirtyLog does what FetchDirtyLog does, and calls each for every word that has bits: word is the log of pages
	// 64*w and following. If done is false it has done nothing, since the words of this slot are not known.
	TakeDirtyLog(slot int, each func(w int, word uint64)) (done bool, err error)
}

// Source is a machine that can be sent. It may also be a [Hinting] and a [Throttler]. The
// methods for the handoff are called in the order in which they are listed.
type Source interface {
	RAM
	DirtyLog
	MigrationConfig() ([]byte, error) // the machine, in the VMM's encoding, for Builder.Build
	Paused() bool                     // by its user: the guest does not run, so that stopping it costs it nothing
	// PrepareStop does what makes the stop shorter while the guest runs: it flushes disks. It may take long, and returns
	// when ctx ends. It is called again before each stop.
	PrepareStop(ctx context.Context) error
	// PauseForHandoff stops the vCPUs, completes their pending port and MMIO accesses (which may write RAM), and stops
	// the devices. Afterwards nothing writes guest memory.
	PauseForHandoff(ctx context.Context) (wasRunning bool, err error)
	SaveState(ctx context.Context) ([]byte, error) // of devices and vCPUs; it may write RAM
	// YieldForHandoff gives up what only one side may hold, such as locks on disks. It comes last before COMMIT.
	YieldForHandoff(ctx context.Context) error
	// ResumeAfterAbort undoes PauseForHandoff and YieldForHandoff. Its context has not ended, even if the migration's has.
	ResumeAfterAbort(ctx context.Context) error
}

// Throttler is a [Source] whose guest can be slowed down ([Options.AutoConverge]).
type Throttler interface {
	Throttle(percent int) error // of the time vCPUs stay out of the guest, 0 to 99
}

// Sampler is a [Source] whose guest has data that does not travel, since both sides reach it: disks. Its [Target] is a
// [Comparer].
type Sampler interface {
	// SampleStorage describes some of that data as the storage has it, which the session's nonce chooses. It is called
	// after PauseForHandoff, at the same time as SaveState. It returns when ctx ends.
	SampleStorage(ctx context.Context, session [16]byte) ([]byte, error)
}

// Comparer is the [Target] of a [Sampler].
type Comparer interface {
	// CompareStorage fails if the data that is reached here is not that of which SampleStorage has told, with how they
	// differ. It is called while pages land. It returns when ctx ends.
	CompareStorage(ctx context.Context, session [16]byte, samples []byte) error
}

// Previewer is a [Source] that knows some of what its state will have, and what a destination may not be able to load.
type Previewer interface {
	PreviewState() ([]byte, error) // called after MigrationConfig, while the guest runs
}

// PreviewChecker is the [Target] of a [Previewer].
type PreviewChecker interface {
	// CheckPreview fails, as [Builder.Build] does, if a state with this could not be loaded. It is called after Build and
	// before any memory is sent.
	CheckPreview(preview []byte) error
}

// Builder makes the destination's machine, which does not run yet.
type Builder interface {
	// Build makes the machine from what MigrationConfig returned. Its error is sent to the source, one of errors.Join
	// as a list: it should name everything that does not fit.
	Build(ctx context.Context, config []byte) (Target, error)
}

// Timed is a [Target] whose clocks go on while its state is on its way.
type Timed interface {
	// SavedAfter is called just before PrepareState, with a moment after which the source
	// saved the state: the last that this side said and the source waited for.
	SavedAfter(t time.Time)
}

// Target is a machine that is received.
type Target interface {
	RAM
	// Prefault populates pages, whose content stays, while others are written. An error means that it is not possible here.
	Prefault(slot int, first, n uint64) error
	// PrepareState does the part of LoadState that neither reads nor writes guest memory, while pages still land. The
	// stop may be undone then: PrepareState comes again, with another state.
	PrepareState(state []byte) error
	// LoadState restores devices and vCPUs from what PrepareState was given, after the last page has landed. It does not
	// write guest memory.
	LoadState(ctx context.Context, state []byte) error
	// UnloadState undoes LoadState, since the guest goes on at the source. Guest memory stays, more pages land, and
	// PrepareState and LoadState come again.
	UnloadState(ctx context.Context) error
	// Start gives the machine the right to run; with paused it stays stopped. After an error it has executed nothing.
	Start(ctx context.Context, paused bool) error
	Discard() error // frees a machine that never got the right to run
}
