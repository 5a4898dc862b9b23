package balloon_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// sink records its calls.
type sink struct {
	mu   sync.Mutex
	said []string
}

func (s *sink) say(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.said = append(s.said, fmt.Sprintf(format, args...))
}

func (s *sink) HintStart(id uint32) { s.say("start %d", id) }
func (s *sink) HintStop()           { s.say("stop") }
func (s *sink) HintLost()           { s.say("lost") }
func (s *sink) HintLate(n uint64)   { s.say("late %d", n) }
func (s *sink) HintPages(id uint32, ranges []mempage.Range) {
	for _, r := range ranges {
		s.say("%d: %d+%d", id, r.GPA/4096, r.Bytes/4096)
	}
}

// take returns what was said since the last call.
func (s *sink) take() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	said := s.said
	s.said = nil
	return said
}

func (s *sink) expect(t *testing.T, want ...string) {
	t.Helper()
	if said := s.take(); !slices.Equal(said, want) {
		t.Errorf("the sink was told %q, want %q", said, want)
	}
}

func hinter(t *testing.T) (*rig, *sink) {
	r, s := newRig(t, allOf), &sink{}
	r.b.SetHintSink(s)
	return r, s
}

func (r *rig) announce() uint32 {
	r.t.Helper()
	id, err := r.b.NewHintID()
	check(r.t, err)
	r.b.AnnounceHints(id)
	<-r.changed
	if got := r.readConfig(8); got != id {
		r.t.Fatalf("the driver reads command id %d, want %d", got, id)
	}
	return id
}

func (r *rig) command(id uint32) {
	r.t.Helper()
	r.send(hint, []virtiotest.Buffer{r.put(binary.LittleEndian.AppendUint32(nil, id))}, nil)
	r.wait(hint)
}

func (r *rig) free(page, n uint64) {
	r.t.Helper()
	r.send(hint, nil, []virtiotest.Buffer{{GPA: page * 4096, Len: uint32(n * 4096)}})
}

func TestHints(t *testing.T) {
	r, s := hinter(t)
	r.free(1, 1) // before anything was asked for
	r.wait(hint)
	s.expect(t)
	id := r.announce()
	r.command(id)
	r.free(512, 1024)
	r.free(2048, 512)
	r.send(hint, nil, []virtiotest.Buffer{{GPA: 5*4096 + 1, Len: 4096}, {GPA: 7 * 4096, Len: 4097}})
	r.wait(hint)
	r.command(balloon.CommandStop)
	s.expect(t, fmt.Sprint("start ", id), fmt.Sprint(id, ": 512+1024"), fmt.Sprint(id, ": 2048+512"), fmt.Sprint(id, ": 7+1"), "stop")
	r.free(1, 1) // it has said that it has ended
	r.wait(hint)
	s.expect(t)
	r.b.StopHints()
	<-r.changed
	r.b.DoneHints()
	<-r.changed
	if got := r.readConfig(8); got != balloon.CommandDone {
		t.Errorf("command %d", got)
	}
	r.noReset()
}

// What the guest says under an id that is no longer current does not count.
func TestHintsUnderAnOldID(t *testing.T) {
	r, s := hinter(t)
	old := r.announce()
	r.command(old)
	id := r.announce()
	r.free(1, 1)
	r.wait(hint)
	s.expect(t, fmt.Sprint("start ", old), "late 1")
	r.command(old)
	r.free(2, 3)
	r.wait(hint)
	s.expect(t, "late 3")
	r.command(id)
	r.free(3, 1)
	r.wait(hint)
	s.expect(t, fmt.Sprint("start ", id), fmt.Sprint(id, ": 3+1"))
	r.b.StopHints()
	r.free(4, 1)
	r.wait(hint)
	s.expect(t, "late 1")
	// The sink gets the driver's own end nevertheless: a migration waits for it.
	r.command(balloon.CommandStop)
	s.expect(t, "stop")
	r.command(balloon.CommandDone)
	r.free(5, 1)
	r.wait(hint)
	s.expect(t)
}

// A driver's START points to a variable, which holds the id that it answers to
// now and not the one that it answered to then. What was queued before an id is
// announced does not count under it, whatever it says when it is read.
func TestHintsQueuedBeforeTheAnnouncement(t *testing.T) {
	r, s := hinter(t)
	variable := r.put(binary.LittleEndian.AppendUint32(nil, balloon.CommandStop))
	assign := func(id uint32) {
		check(t, r.mem.WriteAt(binary.LittleEndian.AppendUint32(nil, id), variable.GPA))
	}
	old := r.announce()
	assign(old)
	// The device is slow: it has not looked at the queue yet.
	for range 2 {
		for _, b := range []virtiotest.Buffer{variable, {GPA: 4096, Len: 4096}} {
			readable, writable := []virtiotest.Buffer{b}, []virtiotest.Buffer(nil)
			if b != variable {
				readable, writable = nil, readable
			}
			if _, ok := r.drivers[hint].Add(readable, writable); !ok {
				t.Fatal("the queue is full")
			}
		}
	}
	r.b.DoneHints() // that migration has ended
	<-r.changed
	id := r.announce() // and this is another
	assign(id)
	r.send(hint, []virtiotest.Buffer{variable}, nil)
	r.free(2, 1)
	r.wait(hint)
	s.expect(t, "late 1", "late 1", fmt.Sprint("start ", id), fmt.Sprint(id, ": 2+1"))
}

// An id that waits for its announcement is forgotten with the next command.
func TestHintsStoppedBeforeTheAnnouncement(t *testing.T) {
	r, _ := hinter(t)
	check(t, r.b.Pause(ctx(t)))
	id, err := r.b.NewHintID()
	check(t, err)
	r.b.AnnounceHints(id)
	r.b.StopHints()
	<-r.changed
	check(t, r.b.Resume())
	r.free(1, 1)
	r.wait(hint)
	if got := r.readConfig(8); got != balloon.CommandStop {
		t.Errorf("the driver reads command id %d after the stop", got)
	}
}

func TestHintsInBulk(t *testing.T) {
	r, s := hinter(t)
	id := r.announce()
	r.command(id)
	s.take()
	var many []virtiotest.Buffer
	for i := range uint64(100) {
		many = append(many, virtiotest.Buffer{GPA: i * 8192, Len: 4096})
	}
	for range 10 {
		r.drivers[hint].Indirect = true
		r.send(hint, nil, many[:virtiotest.MaxIndirect])
	}
	r.wait(hint)
	if n := len(s.take()); n != 10*virtiotest.MaxIndirect {
		t.Errorf("%d ranges", n)
	}
}

// Ids are never used again: not after a reset, not on another host, and not
// when the counter is exhausted.
func TestHintIDs(t *testing.T) {
	r, s := hinter(t)
	seen := map[uint32]bool{balloon.CommandStop: true, balloon.CommandDone: true}
	id := r.announce()
	seen[id] = true
	r.b.Reset()
	s.expect(t, "lost")
	if r.readConfig(8) != balloon.CommandStop {
		t.Error("a new driver is asked for hints by an old id")
	}
	if _, err := r.b.NewHintID(); !errors.Is(err, balloon.ErrNoHints) {
		t.Errorf("hints of no driver: %v", err)
	}
	state, err := r.b.SaveState()
	check(t, err)
	r.newDevice()
	check(t, r.b.LoadState(state))
	check(t, r.b.Activate(r.features, r.queues, r))
	if id := r.announce(); seen[id] {
		t.Errorf("id %d again", id)
	}
	r.b.Reset()
	raw, err := strictcbor.Marshal(balloon.State{LastID: 1<<32 - 1})
	check(t, err)
	check(t, r.b.LoadState(raw))
	check(t, r.b.Activate(r.features, r.queues, r))
	if id := r.announce(); id <= balloon.CommandDone {
		t.Errorf("id %d means something else", id)
	}
}

func TestHintsOfAPoisonedGuest(t *testing.T) {
	r, s := hinter(t)
	id := r.announce()
	r.writeConfig(12, 0xaaaaaaaa)
	r.command(id)
	r.free(1, 1)
	r.wait(hint)
	s.expect(t, "late 1")
	if _, err := r.b.NewHintID(); !errors.Is(err, balloon.ErrPoison) {
		t.Error(err)
	}
}

func TestHintsOfAHostileGuest(t *testing.T) {
	r, _ := hinter(t)
	r.send(hint, []virtiotest.Buffer{r.put([]byte{1, 2, 3, 4, 5})}, nil)
	<-r.broken
	r, _ = hinter(t)
	r.free(1<<40, 1)
	if err := <-r.broken; err == nil {
		t.Error("no reason")
	}
}

// A pause in the middle of an answer does not end it.
func TestHintsAcrossAPause(t *testing.T) {
	r, s := hinter(t)
	id := r.announce()
	r.command(id)
	check(t, r.b.Pause(ctx(t)))
	check(t, r.b.Pause(ctx(t)))
	r.free(1, 1)
	r.b.DoneHints()
	check(t, r.b.Resume())
	r.wait(hint)
	s.expect(t, fmt.Sprint("start ", id), "late 1")
}
