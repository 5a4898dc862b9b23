package migrate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"time"
)

// Options are the limits of one outgoing migration. The zero value of a field
// means what its comment says; [DefaultOptions] has the usual ones.
type Options struct {
	// DowntimeLimit is how long the guest may stand still: precopy goes on
	// until what remains can be sent, and the state loaded, within it.
	// 0: 300 ms.
	DowntimeLimit time.Duration
	// BandwidthLimit bounds the precopy rounds, in bytes a second. What is
	// sent while the guest stands still is not throttled. 0: no limit.
	BandwidthLimit uint64
	// Timeout is for the whole migration up to COMMIT; after it the migration
	// is given up and the guest goes on at the source. 0: one hour.
	Timeout time.Duration
	// MaxRounds gives up after so many precopy rounds that did not bring the
	// estimate under DowntimeLimit. 0: no limit.
	MaxRounds int
	// AutoConverge slows the guest down, in steps, when rounds stop shrinking.
	// Off, a guest that writes faster than the link never arrives.
	AutoConverge bool
	// ClearBitmapShift is the base-2 logarithm of the pages that one
	// KVM_CLEAR_DIRTY_LOG covers, 6 to 31. 0: 18 (1 GiB).
	ClearBitmapShift uint
	// Hints says whether the guest is asked which of its pages are free, so that
	// those are not sent. "": [HintsAuto].
	Hints HintMode
	// HintWait is how long, at most, the first round waits for the guest to say
	// all that it has to; it waits a quarter of that for the guest to begin.
	// 0: 1 s.
	HintWait time.Duration
	// Channels is how many connections carry pages; the destination may grant
	// fewer. 0: see DefaultChannels.
	Channels int
	// Compression is what the content of pages is compressed with. "": none.
	Compression Compression
	// VerifyPages sends a hash of every page while both sides stand still and
	// lets the destination compare. It is for tests: it adds the time of
	// hashing all memory to the downtime.
	VerifyPages bool
	// Dial makes each connection of the migration to the address that [New] got.
	// nil: TCP to host:port; a name is resolved once.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// PeerTimeout is how long the peer may make no progress at all before it
	// counts as dead. 0: 10 s.
	PeerTimeout time.Duration
}

// Bounds of [Options].
const (
	MinClearBitmapShift = 6  // KVM clears whole 64-page words
	MaxClearBitmapShift = 31 // as in QEMU
	// MinBandwidthLimit in bytes a second: one batch has at least 64 pages,
	// and the pause after one must stay well below PeerTimeout.
	MinBandwidthLimit = 64 << 10

	defaultDowntimeLimit    = 300 * time.Millisecond
	defaultTimeout          = time.Hour
	defaultClearBitmapShift = 18
	defaultPeerTimeout      = 10 * time.Second
	defaultHintWait         = time.Second
	// MaxHintWait is half of what a destination takes for silence.
	MaxHintWait = defaultPeerTimeout / 2
)

// DefaultOptions returns the options that a zero value stands for, spelt out.
func DefaultOptions() Options { return Options{}.withDefaults() }

func (o Options) withDefaults() Options {
	if o.DowntimeLimit == 0 {
		o.DowntimeLimit = defaultDowntimeLimit
	}
	if o.Timeout == 0 {
		o.Timeout = defaultTimeout
	}
	if o.ClearBitmapShift == 0 {
		o.ClearBitmapShift = defaultClearBitmapShift
	}
	if o.PeerTimeout == 0 {
		o.PeerTimeout = defaultPeerTimeout
	}
	if o.Hints == "" {
		o.Hints = HintsAuto
	}
	if o.HintWait == 0 {
		o.HintWait = defaultHintWait
	}
	if o.Channels == 0 {
		o.Channels = DefaultChannels()
	}
	if o.Compression == "" {
		o.Compression = CompressNone
	}
	return o
}

// DefaultChannels is how many connections carry pages if nobody says: two, or
// one where there is only one processor. docs/benchmarks.md has the
// measurements.
func DefaultChannels() int { return min(2, runtime.GOMAXPROCS(0)) }

// Validate reports every option that is out of its bounds.
func (o Options) Validate() error {
	o = o.withDefaults()
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if o.DowntimeLimit < time.Millisecond {
		bad("downtime limit %v: at least 1ms is needed", o.DowntimeLimit)
	}
	if o.BandwidthLimit != 0 && o.BandwidthLimit < MinBandwidthLimit {
		bad("bandwidth limit %d bytes/s: at least %d, or 0 for none", o.BandwidthLimit, MinBandwidthLimit)
	}
	if o.Timeout < 0 {
		bad("timeout %v: must not be negative", o.Timeout)
	}
	if o.MaxRounds < 0 {
		bad("max rounds %d: must not be negative", o.MaxRounds)
	}
	if o.ClearBitmapShift < MinClearBitmapShift || o.ClearBitmapShift > MaxClearBitmapShift {
		bad("clear bitmap shift %d: must be %d to %d", o.ClearBitmapShift, MinClearBitmapShift, MaxClearBitmapShift)
	}
	switch o.Hints {
	case HintsAuto, HintsOn, HintsOff:
	default:
		bad("hints %q: %s, %s or %s is wanted", o.Hints, HintsAuto, HintsOn, HintsOff)
	}
	if o.HintWait < 0 {
		bad("hint wait %v: must not be negative", o.HintWait)
	}
	if o.HintWait > MaxHintWait {
		bad("hint wait %v: at most %v, since the destination hears nothing meanwhile", o.HintWait, MaxHintWait)
	}
	if o.PeerTimeout < 0 {
		bad("peer timeout %v: must not be negative", o.PeerTimeout)
	}
	if o.Channels < 1 || o.Channels > MaxChannels {
		bad("%d channels: must be between 1 and %d", o.Channels, MaxChannels)
	}
	if _, err := ParseCompression(string(o.Compression)); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
