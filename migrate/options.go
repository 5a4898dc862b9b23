package migrate

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"runtime"
	"time"
)

// Options are the limits of one outgoing migration. The zero value is usable: a
// field that is zero means what its comment says.
type Options struct {
	// DowntimeLimit bounds the guest's stop: rounds go on until the rest can be sent, and loaded, within it. 0: 300 ms.
	DowntimeLimit time.Duration
	// BandwidthLimit bounds the rounds, in bytes a second, but not what is sent in the stop. 0: no limit.
	BandwidthLimit uint64
	// Timeout bounds the migration until COMMIT; then it is given up, and the guest goes on at the source. 0: 1 h.
	Timeout time.Duration
	// MaxRounds bounds the precopy rounds; then the migration is given up. 0: no limit.
	MaxRounds int
	// AutoConverge slows the guest down, in steps, if rounds do not shrink. Otherwise a guest that writes faster than
	// the link never arrives.
	AutoConverge bool
	// ClearBitmapShift is the base-2 logarithm of the pages that one KVM_CLEAR_DIRTY_LOG covers, 6 to 31. 0: 18 (1 GiB).
	ClearBitmapShift uint
	// Hints says whether the guest is asked for its free pages. "": HintsAuto.
	Hints HintMode
	// HintWait bounds how long the first round waits for the guest's answer; only for one that begins in a quarter of it. 0: 1 s.
	HintWait time.Duration
	// Channels is how many connections carry pages, 1 to 16. 0: 2, or 1 on one processor.
	Channels int
	// Compression is that of page content. "": CompressNone.
	Compression Compression
	// CopyDisks copies the guest's disks that the destination does not reach, while the guest runs. The source must be
	// a [DiskSource]. Otherwise a destination must reach all of them.
	CopyDisks bool
	// VerifyPages compares hashes of all pages in the stop, which takes that much longer. It is for tests.
	VerifyPages bool
	// PeerTimeout is how long the peer may be silent before it counts as dead. One that lives says so, and a slow link
	// is only slow. 0: 10 s.
	PeerTimeout time.Duration
	// SharedMemory says that the destination, a process of this host, has the guest's memory already: no page is sent, and
	// the guest stops at once. It needs a destination whose Builder is a [Sharer].
	SharedMemory bool
	// Referee decides who runs the guest if the answer to COMMIT does not come. nil: the destination is asked until it answers.
	Referee Referee
	// TLS makes all connections TLS 1.3, with certificates of both sides. It must have RootCAs and a certificate for this
	// host, which is the same for all connections of the migration. ServerName "": the host of the address. nil: plain.
	TLS *tls.Config
	// Snapshot makes the migration a snapshot: the destination keeps the guest, and does not run it. nil: it is none.
	Snapshot *Snapshot
	// Postcopy lets the guest move before all of its memory has: what is left then follows while it runs at the destination.
	// It does after that many rounds, or with PostcopyAuto when rounds stop shrinking. 0: never. From then until the last
	// page has arrived the guest needs the processes of both sides.
	Postcopy int
	// ID names the migration in all that is reported of it. "": it has no name.
	ID string
	// Trigger says who has asked for the migration, in a word. The engine only carries it.
	Trigger string
	// Notify is called at each change of phase and at the end of each round, in order. It must return at once, and call
	// nothing of the migration. nil: nobody is told.
	Notify func(Notice)
	// Dial makes each connection, to the address that New was given; TLS comes on top of it. nil: TCP to host:port, where
	// the name is resolved once, so all connections go to one peer; or the unix socket of unix:PATH. Deadlines must work;
	// one is set only to end a connection.
	Dial func(ctx context.Context, address string) (net.Conn, error)
}

// PostcopyAuto is [Options.Postcopy] when rounds stop shrinking.
const PostcopyAuto = -1

// Bounds of [Options].
const (
	MaxChannels       = 16
	MaxHintWait       = 5 * time.Second // so long answers are not worth waiting for
	MinBandwidthLimit = 64 << 10        // a frame has at least 64 pages

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
		if o.SharedMemory {
			o.Channels = 1
		}
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
		bad("hint wait %v: must be between 0s and %v", o.HintWait, MaxHintWait)
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
	if o.SharedMemory && (o.VerifyPages || o.Compression != CompressNone) {
		bad("memory that is shared is not sent: there is nothing to verify or to compress")
	}
	if o.Snapshot != nil {
		if err := o.Snapshot.validate(o); err != nil {
			bad("%w", err)
		}
	}
	if o.Postcopy < PostcopyAuto {
		bad("postcopy after %d rounds: must be at least 1", o.Postcopy)
	}
	if o.Postcopy != 0 && (o.VerifyPages || o.SharedMemory || o.Snapshot != nil) {
		bad("postcopy: a guest whose memory is verified, shared or kept does not move before all of its memory has")
	}
	if o.TLS != nil {
		if _, err := clientTLS(o.TLS); err != nil {
			bad("%w", err)
		}
	}
	return errors.Join(errs...)
}
