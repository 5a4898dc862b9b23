package balloon

import (
	"encoding/binary"
	"fmt"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/virtio"
)

// Command ids with a meaning, section 5.5.6.5. Any other id asks for hints.
const (
	CommandStop = 0
	CommandDone = 1
	commandMin  = 2
)

// SetHintSink sets the receiver of hints. If it is nil, hints are dropped.
func (b *Balloon) SetHintSink(s mempage.HintSink) {
	b.config.Lock()
	defer b.config.Unlock()
	b.sink = s
}

// NewHintID returns a command id that this guest was never given before, on any
// host. It fails with [ErrNoHints] or [ErrPoison]. The hint sink must know the id
// before [Balloon.AnnounceHints].
func (b *Balloon) NewHintID() (uint32, error) {
	if !b.negotiated(FeatureFreePageHint) {
		return 0, ErrNoHints
	}
	if b.poison() != 0 {
		return 0, ErrPoison
	}
	b.config.Lock()
	defer b.config.Unlock()
	b.state.LastID = max(b.state.LastID+1, commandMin)
	return b.state.LastID, nil
}

// AnnounceHints asks the guest for hints under an id from [Balloon.NewHintID]. The
// guest may answer late, or not at all.
//
// The driver reads the id when the device has consumed all requests that were
// queued before, so that these do not count. The ids in those requests cannot be
// used for that: a START points to a variable of the driver (Linux:
// cmd_id_active), which may have a newer id by the time the device reads it.
func (b *Balloon) AnnounceHints(id uint32) {
	b.config.Lock()
	b.waiting = id
	q := b.hintQueue
	b.config.Unlock()
	if q != nil {
		q.Signal()
	}
}

// announceWaiting announces the id that waits, if there is one.
func (b *Balloon) announceWaiting() {
	b.config.Lock()
	id := b.waiting
	b.waiting = 0
	if id != 0 {
		b.state.Command = id
	}
	n := b.notifier
	b.config.Unlock()
	if id != 0 && n != nil {
		n.ConfigChanged()
	}
}

// StopHints asks the guest to stop hinting. The guest keeps the pages that it has
// hinted unused until [Balloon.DoneHints].
func (b *Balloon) StopHints() { b.command(CommandStop) }

// DoneHints lets the guest use the pages that it has hinted. It may be called while
// the device is paused.
func (b *Balloon) DoneHints() { b.command(CommandDone) }

func (b *Balloon) command(id uint32) {
	b.changeConfig(func(s *State) {
		s.Command = id
		b.waiting = 0
	})
}

// hinting returns the sink, and whether id is the current one.
func (b *Balloon) hinting(id uint32) (mempage.HintSink, bool) {
	b.config.Lock()
	defer b.config.Unlock()
	return b.sink, id >= commandMin && id == b.state.Command && b.sink != nil && b.poisonLocked() == 0
}

// hintRanges is how many ranges the sink gets at once.
const hintRanges = 256

// hintServer serves the hint queue: readable buffers are command ids, writable
// buffers are free memory. Only the queue's task uses it.
type hintServer struct {
	b      *Balloon
	id     uint32 // the id that the driver answers to; CommandStop: none
	late   bool   // the driver answers to an id that is not current
	ranges [hintRanges]mempage.Range
	count  int // ranges that the sink has not got yet
}

// serve passes the pages of a request to the sink.
func (h *hintServer) serve(c *virtio.Chain) (uint32, error) {
	if c.ReadableLen() > 0 {
		if err := h.command(c); err != nil {
			return 0, err
		}
	}
	h.collect(c)
	h.tell()
	return 0, nil
}

// empty is called when all that the driver had queued is consumed.
func (h *hintServer) empty([]virtio.Chain, []uint32) int {
	h.b.announceWaiting()
	return virtio.Keep
}

// command notes which id the driver answers to. Hints under an id other than the
// one announced last do not count.
func (h *hintServer) command(c *virtio.Chain) error {
	var raw [4]byte
	if c.ReadableLen() != len(raw) || c.ReadAt(raw[:], 0) != len(raw) {
		return fmt.Errorf("balloon: a command id must have 4 bytes, got %d", c.ReadableLen())
	}
	id := binary.LittleEndian.Uint32(raw[:])
	sink, current := h.b.hinting(id)
	h.id, h.late = CommandStop, id >= commandMin && !current
	switch {
	case current:
		h.id = id
		sink.HintStart(id)
	case id == CommandStop && sink != nil:
		sink.HintStop()
	}
	return nil
}

// collect notes the pages of a request, if the driver answers to an id.
func (h *hintServer) collect(c *virtio.Chain) {
	if h.id == CommandStop && !h.late {
		return
	}
	for i := range c.Writable {
		s := &c.Writable[i]
		gpa, n := wholePages(s.GPA, uint64(len(s.Buf)))
		if n == 0 {
			continue
		}
		if h.late {
			h.tellLate(n / mempage.Size)
			continue
		}
		h.ranges[h.count] = mempage.Range{GPA: gpa, Bytes: n}
		if h.count++; h.count == hintRanges {
			h.tell()
		}
	}
}

// tell passes the noted ranges to the sink, if the id is still current.
func (h *hintServer) tell() {
	if h.count == 0 {
		return
	}
	if sink, current := h.b.hinting(h.id); current {
		sink.HintPages(h.id, h.ranges[:h.count])
	} else {
		var n uint64
		for _, r := range h.ranges[:h.count] {
			n += r.Bytes / mempage.Size
		}
		h.tellLate(n)
	}
	h.count = 0
}

func (h *hintServer) tellLate(pages uint64) {
	if sink, _ := h.b.hinting(CommandStop); sink != nil {
		sink.HintLate(pages)
	}
}
