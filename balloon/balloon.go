// Package balloon is the traditional memory balloon, virtio 1.2 section 5.5.
//
// The guest gives memory to the host in two ways. It inflates the balloon by
// pages that the host keeps until the guest deflates it ([Balloon.SetTarget]);
// and it reports pages that are free now and that it may use again at any time.
// Both are punched out of guest memory, and read as zero afterwards.
//
// During a migration the guest hints which pages are free and need not be sent.
// Hints leave the pages as they are, and go to a [mempage.HintSink]. The guest
// also sends statistics about its memory.
package balloon

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/virtio"
)

// Feature bits, section 5.5.3.
const (
	FeatureMustTellHost uint64 = 1 << iota // not offered: a page comes back by an access
	FeatureStats
	FeatureDeflateOnOOM
	FeatureFreePageHint
	FeaturePagePoison
	FeatureReporting
)

// Queues, section 5.5.2.
const (
	inflateQueue = iota
	deflateQueue
	statsQueue
	hintQueue
	reportQueue
	queueCount

	// queueSize is the size of every queue. Linux has at most one request in
	// each of the first three; only hints queue up.
	queueSize = 128
)

var (
	// ErrNoStats: the guest's driver sends no statistics.
	ErrNoStats = errors.New("the guest's balloon driver sends no statistics")
	// ErrNoHints: the guest has no driver that hints free pages.
	ErrNoHints = errors.New("the guest has no balloon driver that hints free pages")
	// ErrPoison: the guest checks a pattern in its free pages, so a hinted page
	// must be sent.
	ErrPoison = errors.New("the guest fills free pages with a pattern and checks it")
)

// Puncher gives guest memory back to the host; *memory.Memory implements it.
type Puncher interface {
	// Punch frees [gpa, gpa+n), whole pages, which then read as zero, and marks
	// them in the VMM's dirty bitmap: a migration may have sent the old content.
	Punch(gpa, n uint64) error
}

// Config configures a balloon.
type Config struct {
	// Memory is guest memory. Required.
	Memory virtio.Memory
	// Puncher gives guest memory back. Required.
	Puncher Puncher
	// RAM is the guest's memory in bytes, and the limit of the target.
	RAM uint64
	// Log may be nil: nothing is logged.
	Log *slog.Logger
}

// Balloon is the device. It implements virtio.Device.
type Balloon struct {
	cfg          Config
	keepReported bool

	config    sync.Mutex // guards the fields down to waiting
	state     State
	active    bool
	features  uint64 // negotiated
	notifier  virtio.Notifier
	sink      mempage.HintSink
	hintQueue *virtio.Queue // nil: the driver does not hint
	waiting   uint32        // a command id that is not announced yet, or 0

	loop *virtio.Loop // nil when not active; belongs to the transport's calls

	stats   statsBox
	punched counter
}

// Offsets in struct virtio_balloon_config, section 5.5.4.
const (
	configTarget = 4 * iota
	configActual
	configCommand
	configPoison
	configSize
)

// New makes an empty balloon.
func New(cfg Config) (*Balloon, error) {
	if cfg.Memory == nil || cfg.Puncher == nil {
		return nil, errors.New("balloon: Memory and Puncher are required")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	b := &Balloon{cfg: cfg}
	b.stats.changed, b.stats.wake = make(chan struct{}), make(chan struct{}, 1)
	return b, nil
}

// SetTarget sets how many bytes of the guest's memory the balloon is to hold: a
// multiple of [mempage.Size], and less than all. The guest follows over time (see
// [Balloon.Actual]); a guest without a driver never does.
func (b *Balloon) SetTarget(bytes uint64) error {
	if bytes%mempage.Size != 0 {
		return fmt.Errorf("balloon target must be a multiple of %d bytes, got %d", mempage.Size, bytes)
	}
	if bytes > 0 && bytes >= b.cfg.RAM {
		return fmt.Errorf("balloon target must be less than the guest's %d bytes, got %d", b.cfg.RAM, bytes)
	}
	if bytes/mempage.Size > 1<<32-1 {
		return fmt.Errorf("balloon target must be less than 16 TiB, got %d bytes", bytes)
	}
	b.changeConfig(func(s *State) { s.Target = uint32(bytes / mempage.Size) })
	return nil
}

// changeConfig changes the configuration structure and tells the driver, if there
// is one.
func (b *Balloon) changeConfig(change func(*State)) {
	b.config.Lock()
	change(&b.state)
	n := b.notifier
	b.config.Unlock()
	if n != nil {
		n.ConfigChanged()
	}
}

// Target is how much the balloon is to hold, in bytes.
func (b *Balloon) Target() uint64 {
	b.config.Lock()
	defer b.config.Unlock()
	return uint64(b.state.Target) * mempage.Size
}

// Actual is how much the balloon holds according to the guest, in bytes.
func (b *Balloon) Actual() uint64 {
	b.config.Lock()
	defer b.config.Unlock()
	return uint64(b.state.Actual) * mempage.Size
}

// negotiated reports whether an active driver has accepted a feature.
func (b *Balloon) negotiated(feature uint64) bool {
	b.config.Lock()
	defer b.config.Unlock()
	return b.active && b.features&feature != 0
}

// poison is the value that the guest expects in free pages, or 0.
func (b *Balloon) poison() uint32 {
	b.config.Lock()
	defer b.config.Unlock()
	return b.poisonLocked()
}

func (b *Balloon) poisonLocked() uint32 {
	if b.features&FeaturePagePoison == 0 {
		return 0
	}
	return b.state.Poison
}

// ReadConfig fills p from the configuration structure.
func (b *Balloon) ReadConfig(off uint32, p []byte) {
	var c [configSize]byte
	b.config.Lock()
	binary.LittleEndian.PutUint32(c[configTarget:], b.state.Target)
	binary.LittleEndian.PutUint32(c[configActual:], b.state.Actual)
	binary.LittleEndian.PutUint32(c[configCommand:], b.state.Command)
	binary.LittleEndian.PutUint32(c[configPoison:], b.state.Poison)
	b.config.Unlock()
	if off < configSize {
		copy(p, c[off:])
	}
}

// WriteConfig writes the driver's two fields, actual and poison_val, byte by byte.
func (b *Balloon) WriteConfig(off uint32, p []byte) {
	b.config.Lock()
	defer b.config.Unlock()
	for i, v := range p {
		at := uint64(off) + uint64(i)
		switch {
		case at >= configActual && at < configActual+4:
			setByte(&b.state.Actual, at-configActual, v)
		case at >= configPoison && at < configPoison+4:
			setByte(&b.state.Poison, at-configPoison, v)
		}
	}
}

func setByte(w *uint32, i uint64, v byte) {
	*w = *w&^(0xff<<(8*i)) | uint32(v)<<(8*i)
}
