package balloon

import (
	"encoding/binary"
	"fmt"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/virtio"
)

// Command ids that mean something by themselves, section 5.5.6.5; any other
// one asks for hints.
const (
	CommandStop = 0
	CommandDone = 1
	commandMin  = 2
)

// SetHintSink sets who gets hints; nil: they are dropped.
func (b *Balloon) SetHintSink(s mempage.HintSink) {
	b.config.Lock()
	defer b.config.Unlock()
	b.sink = s
}

// NewHintID returns a command id unlike all that this guest was given before,
// on any host. It fails with [ErrNoHints] or [ErrPoison]. Who takes hints notes
// the id before announcing it.
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

// AnnounceHints asks the guest for hints under an id from [Balloon.NewHintID].
// The guest answers in its own time, or not at all.
//
// The id is announced when all that the driver had queued before is consumed,
// so that none of it counts. To look at the ids in there would not do: a START
// points to a variable of the driver (Linux: cmd_id_active), and one that is
// read late says what the driver answers to by then.
func (b *Balloon) AnnounceHints(id uint32) {
	b.config.Lock()
	b.waiting = id
	q := b.hintQueue
	b.config.Unlock()
	if q != nil {
		q.Signal()
	}
}

// announceWaiting announces the id that waits for it, if there is one.
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

// StopHints asks the guest to end its answer. It keeps the pages that it has
// hinted until [Balloon.DoneHints].
func (b *Balloon) StopHints() { b.command(CommandStop) }

// DoneHints lets the guest use what it has hinted. It may be called while the
// device is paused, and then travels.
func (b *Balloon) DoneHints() { b.command(CommandDone) }

func (b *Balloon) command(id uint32) {
	b.changeConfig(func(s *State) {
		s.Command = id
		b.waiting = 0
	})
}

// hinting returns the sink and whether id is what the guest was asked for.
func (b *Balloon) hinting(id uint32) (mempage.HintSink, bool) {
	b.config.Lock()
	defer b.config.Unlock()
	return b.sink, id >= commandMin && id == b.state.Command && b.sink != nil && b.poisonLocked() == 0
}

// hintRanges is how many ranges the sink is told at once.
const hintRanges = 256

// hintServer serves the hint queue: readable buffers are command ids, writable
// ones are free memory. It belongs to the queue's task.
type hintServer struct {
	b      *Balloon
	id     uint32 // what the driver is answering to; CommandStop: nothing
	late   bool   // it is answering to an id that is not current
	ranges [hintRanges]mempage.Range
	count  int // ranges that the sink has not been told
}

// serve tells the sink of the pages in a request.
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

// empty: all that the driver had queued is consumed.
func (h *hintServer) empty([]virtio.Chain, []uint32) int {
	h.b.announceWaiting()
	return virtio.Keep
}

// command takes the driver's word of what it is answering to. An id that is not
// the one that was announced last begins an answer to nothing.
func (h *hintServer) command(c *virtio.Chain) error {
	var raw [4]byte
	if c.ReadableLen() != len(raw) || c.ReadAt(raw[:], 0) != len(raw) {
		return fmt.Errorf("balloon: a command id of %d bytes in the free page hint queue", c.ReadableLen())
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

// collect notes the pages of a request, if the driver answers to something.
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

// tell passes on what was noted, if the id is still current.
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
