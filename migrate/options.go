package migrate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"time"
)

// Options are the limits of one outgoing migration. A field that is zero has the
// value of [DefaultOptions].
type Options struct {
	DowntimeLimit    time.Duration // of the guest's stop: rounds go on until the rest can be sent within it; 300 ms
	BandwidthLimit   uint64        // of the rounds, in bytes a second; the stop is not limited; 0: none
	Timeout          time.Duration // of the whole migration until COMMIT; 1 h
	MaxRounds        int           // of precopy, before it gives up; 0: no limit
	AutoConverge     bool          // slow the guest down, in steps, if rounds do not shrink
	ClearBitmapShift uint          // base-2 logarithm of the pages that one KVM_CLEAR_DIRTY_LOG covers, 6 to 31; 18
	Hints            HintMode      // whether the guest is asked for its free pages; HintsAuto
	HintWait         time.Duration // for the guest's answer, before the first round; a quarter for it to begin; 1 s
	Channels         int           // connections that carry pages, 1 to 16; 2, or 1 on one processor
	Compression      Compression   // of page content; CompressNone
	VerifyPages      bool          // for tests: compare hashes of all pages in the stop, which takes that much longer
	PeerTimeout      time.Duration // without any progress, after which the peer counts as dead; 10 s
	// Dial makes each connection to the address that New was given. nil: TCP to host:port, whose name is resolved once.
	Dial func(ctx context.Context, address string) (net.Conn, error)
}

// Bounds of [Options].
const (
	MaxChannels       = 16
	MaxHintWait       = defaultPeerTimeout / 2 // half of what a destination takes for silence
	MinBandwidthLimit = 64 << 10               // a frame has at least 64 pages, and takes less than PeerTimeout then

	minClearBitmapShift = 6  // KVM clears whole 64-page words
	maxClearBitmapShift = 31 // as in QEMU

	defaultDowntimeLimit    = 300 * time.Millisecond
	defaultTimeout          = time.Hour
	defaultClearBitmapShift = 18
	defaultPeerTimeout      = 10 * time.Second
	defaultHintWait         = time.Second
)

// DefaultOptions returns the options that the zero value stands for.
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
		o.Channels = defaultChannels()
	}
	if o.Compression == "" {
		o.Compression = CompressNone
	}
	return o
}

// defaultChannels is two: docs/benchmarks.md has the measurements.
func defaultChannels() int { return min(2, runtime.GOMAXPROCS(0)) }

// Validate reports every option that is out of its bounds.
func (o Options) Validate() error {
	o = o.withDefaults()
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if o.DowntimeLimit < time.Millisecond {
		bad("downtime limit %v: must be at least 1ms", o.DowntimeLimit)
	}
	if o.BandwidthLimit != 0 && o.BandwidthLimit < MinBandwidthLimit {
		bad("bandwidth limit %d bytes/s: must be at least %d, or 0 for none", o.BandwidthLimit, MinBandwidthLimit)
	}
	if o.Timeout < 0 {
		bad("timeout %v: must not be negative", o.Timeout)
	}
	if o.MaxRounds < 0 {
		bad("max rounds %d: must not be negative", o.MaxRounds)
	}
	if o.ClearBitmapShift < minClearBitmapShift || o.ClearBitmapShift > maxClearBitmapShift {
		bad("clear bitmap shift %d: must be between %d and %d", o.ClearBitmapShift, minClearBitmapShift, maxClearBitmapShift)
	}
	switch o.Hints {
	case HintsAuto, HintsOn, HintsOff:
	default:
		bad("hints %q: must be %s, %s or %s", o.Hints, HintsAuto, HintsOn, HintsOff)
	}
	if o.HintWait < 0 || o.HintWait > MaxHintWait {
		bad("hint wait %v: must be between 0s and %v, since the destination hears nothing meanwhile", o.HintWait, MaxHintWait)
	}
	if o.PeerTimeout < 0 {
		bad("peer timeout %v: must not be negative", o.PeerTimeout)
	}
	if o.Channels < 1 || o.Channels > MaxChannels {
		bad("%d channels: must be between 1 and %d", o.Channels, MaxChannels)
	}
	switch o.Compression {
	case CompressNone, CompressZstd, CompressLZ4:
	default:
		bad("compression %.80q: must be %s, %s or %s", o.Compression, CompressNone, CompressZstd, CompressLZ4)
	}
	return errors.Join(errs...)
}
