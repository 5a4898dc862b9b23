// Package balloon is the traditional memory balloon, virtio 1.2 section 5.5:
// a guest gives memory back to the host and takes it again, tells how it is
// doing, reports what it has freed, and hints which pages are free while a
// migration looks for pages that it need not send.
//
// Memory comes back in three ways. Inflating takes pages for as long as the
// host wants them ([Balloon.SetTarget]); reporting tells of pages that are free
// now and may be used again at any time. Both are punched out of guest memory
// and read as zero afterwards. Free page hints leave the pages as they are, and
// go to a [mempage.HintSink].
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
	FeatureMustTellHost uint64 = 1 << iota // not offered: a page is used again by touching it
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

	// queueSize is that of every queue. Linux has at most one request in the
	// first three; hints are the ones that wait.
	queueSize = 128
)

var (
	// ErrNoStats: the guest's driver keeps no statistics.
	ErrNoStats = errors.New("the guest's balloon driver keeps no statistics")
	// ErrNoHints: no driver is there that hints free pages.
	ErrNoHints = errors.New("the guest has no balloon driver that hints free pages")
	// ErrPoison: free pages hold a pattern that the guest checks, so that a
	// hinted page may not be dropped.
	ErrPoison = errors.New("the guest fills free pages with a pattern and checks it")
)

// Puncher gives guest memory back to the host; *memory.Memory is one.
type Puncher interface {
	// Punch makes [gpa, gpa+n), whole pages, read as zero, and marks it in the
	// VMM's dirty bitmap: a migration may have sent what was there.
	Punch(gpa, n uint64) error
}

// Config is what a balloon is made from.
type Config struct {
	// Memory is guest memory, to check what the guest says. Required.
	Memory virtio.Memory
	// Puncher gives it back. Required.
	Puncher Puncher
	// RAM is the guest's memory in bytes: the largest target.
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
	hintQueue *virtio.Queue // nil: nobody hints
	waiting   uint32        // a command id that is not announced yet; 0: none

	loop *virtio.Loop // nil when not active; belongs to the transport's calls

	stats   statsBox
	punched counter
}

// configuration is struct virtio_balloon_config, section 5.5.4: four words.
const (
	configTarget = 4 * iota
	configActual
	configCommand
	configPoison
	configSize
)

// New makes a balloon that nothing is in.
func New(cfg Config) (*Balloon, error) {
	if cfg.Memory == nil || cfg.Puncher == nil {
		return nil, errors.New("balloon: needs guest memory")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	b := &Balloon{cfg: cfg}
	b.stats.changed, b.stats.wake = make(chan struct{}), make(chan struct{}, 1)
	return b, nil
}

// SetTarget says how many bytes of the guest's memory the balloon shall hold:
// a multiple of [mempage.Size], and less than all. The guest follows in its own
// time, see [Balloon.Actual]; a guest without a driver never does.
func (b *Balloon) SetTarget(bytes uint64) error {
	if bytes%mempage.Size != 0 {
		return fmt.Errorf("balloon target %d bytes: not a multiple of %d", bytes, mempage.Size)
	}
	if bytes > 0 && bytes >= b.cfg.RAM {
		return fmt.Errorf("balloon target %d bytes: the guest has %d", bytes, b.cfg.RAM)
	}
	if bytes/mempage.Size > 1<<32-1 {
		return fmt.Errorf("balloon target %d bytes: a balloon holds less than 16 TiB", bytes)
	}
	b.changeConfig(func(s *State) { s.Target = uint32(bytes / mempage.Size) })
	return nil
}

// changeConfig changes what the driver reads and tells it, if there is one.
func (b *Balloon) changeConfig(change func(*State)) {
	b.config.Lock()
	change(&b.state)
	n := b.notifier
	b.config.Unlock()
	if n != nil {
		n.ConfigChanged()
	}
}

// Target is what the balloon shall hold, in bytes.
func (b *Balloon) Target() uint64 {
	b.config.Lock()
	defer b.config.Unlock()
	return uint64(b.state.Target) * mempage.Size
}

// Actual is what the balloon holds, in bytes, as the guest has it.
func (b *Balloon) Actual() uint64 {
	b.config.Lock()
	defer b.config.Unlock()
	return uint64(b.state.Actual) * mempage.Size
}

// negotiated says whether an active driver has accepted a feature.
func (b *Balloon) negotiated(feature uint64) bool {
	b.config.Lock()
	defer b.config.Unlock()
	return b.active && b.features&feature != 0
}

// poison is the value that the guest expects in free pages; 0 if it expects
// none.
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

// WriteConfig takes the two fields that are the driver's, actual and
// poison_val, byte by byte.
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
