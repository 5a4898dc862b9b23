package migrate

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"sync"
	"testing"

	"github.com/govmm/govmm/mempage"
)

// plainLog is a dirty log without writes, of memory that need not exist. It counts calls.
type plainLog struct {
	slots        []Slot
	initiallySet bool
	sparse       bool // no log has a bit, and the log knows it

	mu     sync.Mutex // guards what follows
	gets   int
	clears int
	begun  func(slot int, first uint64) // of a CLEAR, without mu; nil: nothing
}

func (l *plainLog) StartDirtyLog() error { return nil }
func (l *plainLog) StopDirtyLog() error  { return nil }
func (l *plainLog) ManualProtect() bool  { return true }
func (l *plainLog) FetchDirtyLog(slot int, bitmap []uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.gets++
	clear(bitmap)
	if l.initiallySet {
		mempage.Bitmap(bitmap).SetRange(0, l.slots[slot].Pages)
	}
	return nil
}
func (l *plainLog) ClearDirtyLog(slot int, first, _ uint64, _ []uint64) error {
	l.mu.Lock()
	l.clears++
	l.initiallySet = false // what is fetched again has been cleared, or is fetched already
	begun := l.begun
	l.mu.Unlock()
	if begun != nil {
		begun(slot, first)
	}
	return nil
}
func (l *plainLog) FetchVMMDirty(int, func(int, uint64)) error { return nil }
func (l *plainLog) BeginSync() error                           { return nil }
func (l *plainLog) TakeDirtyLog(int, func(int, uint64)) (bool, error) {
	return l.sparse, nil
}

// plainRAM is memory of which some pages are populated, and no page exists.
type plainRAM struct {
	slots     []Slot
	populated []mempage.Sparse
	looks     int // calls of NextPopulated
}

func newPlainRAM(slots ...uint64) *plainRAM {
	r := &plainRAM{}
	for i, pages := range slots {
		r.slots = append(r.slots, Slot{GPA: uint64(i) << 40, Pages: pages})
		r.populated = append(r.populated, mempage.NewSparse(pages))
	}
	return r
}

func (r *plainRAM) Slots() []Slot                    { return r.slots }
func (r *plainRAM) Bytes(int, uint64, uint64) []byte { return nil }
func (r *plainRAM) Zero(int, uint64, uint64) error   { return nil }
func (r *plainRAM) Populated(slot int, first, n uint64, bitmap []uint64) error {
	return errors.New("not expected")
}
func (r *plainRAM) NextPopulated(slot int, first, n uint64) (uint64, error) {
	r.looks++
	return r.populated[slot].NextSet(first, first+n), nil
}

// newPass returns a sender, without workers, that begins a pass.
func newPass(t testing.TB, ram RAM, log DirtyLog, shift uint, before func(t *tracker, slot int) error) *sender {
	t.Helper()
	tr, err := newTracker(ram.Slots(), log, shift)
	if err == nil {
		err = tr.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	s, err := newSender(ram, tr, &link{}, &meter{}, Options{ClearBitmapShift: shift}.withDefaults())
	if err != nil {
		t.Fatal(err)
	}
	if before != nil {
		s.before = func(slot int) error { return before(tr, slot) }
	}
	return s
}

type span struct {
	slot     int
	first, n uint64
}

// take picks the next span of the pass; n is 0 at the end.
func (s *sender) take(t testing.TB) (sp span, picked []uint64) {
	t.Helper()
	picked = make([]uint64, maxSpan/mempage.WordBits)
	slot, first, n, err := s.next(t.Context(), picked)
	if err != nil {
		t.Fatal(err)
	}
	return span{slot, first, n}, picked
}

// The last spans of a chunk are picked while the next chunk is being armed, also if that
// is in another slot, whose log is fetched before. So no worker waits for a CLEAR.
func TestTheNextChunkIsArmedAhead(t *testing.T) {
	const shift, chunk = 14, 1 << 14 // 16 spans
	ram := newPlainRAM(2*chunk, chunk)
	log := &plainLog{slots: ram.slots, initiallySet: true}
	var fetches []int
	began, goOn := make(chan span), make(chan struct{})
	log.begun = func(slot int, first uint64) {
		if slot+int(first) > 0 {
			began <- span{slot, first, chunk}
			<-goOn
		}
	}
	s := newPass(t, ram, log, shift, func(tr *tracker, slot int) error {
		fetches = append(fetches, slot)
		_, err := tr.SyncSlot(slot)
		return err
	})
	s.holes, s.leaps = nil, false
	s.stage = s.prepare(t.Context(), 0, 0)
	for at := uint64(0); at < 2*chunk; at += maxSpan {
		if at == chunk {
			goOn <- struct{}{}
		}
		if sp, _ := s.take(t); sp != (span{0, at, maxSpan}) {
			t.Fatalf("picked %+v, expected page %#x", sp, at)
		}
		// A CLEAR is under way for as long as it was not let go on.
		switch at {
		case chunk - 2*maxSpan:
			if sp := <-began; sp != (span{0, chunk, chunk}) {
				t.Fatalf("armed ahead: %+v", sp)
			}
		case 2*chunk - 2*maxSpan:
			if sp := <-began; sp != (span{1, 0, chunk}) {
				t.Fatalf("armed ahead: %+v", sp)
			}
			if !slices.Equal(fetches, []int{0, 1}) {
				t.Fatalf("slots fetched before their pages are picked: %v", fetches)
			}
		}
	}
	goOn <- struct{}{}
	for at := uint64(0); at < chunk; at += maxSpan {
		if sp, _ := s.take(t); sp != (span{1, at, maxSpan}) {
			t.Fatalf("picked %+v, expected page %#x of slot 1", sp, at)
		}
	}
	if sp, _ := s.take(t); sp.n != 0 {
		t.Fatalf("picked %+v after the end", sp)
	}
	s.preparing.Wait()
	if log.clears != 3 {
		t.Errorf("%d CLEARs of 3 chunks", log.clears)
	}
}

// During a CLEAR nothing else waits, but what concerns its chunk or fetches its slot.
func TestTheTrackerIsFreeDuringACLEAR(t *testing.T) {
	const shift, chunk = 10, 1 << 10
	slots := []Slot{{Pages: 2 * chunk}, {GPA: 1 << 40, Pages: chunk}}
	log := &plainLog{slots: slots, initiallySet: true}
	tr, err := newTracker(slots, log, shift)
	if err == nil {
		err = tr.Start()
	}
	if err == nil {
		err = tr.BeginHintEpoch(2) // all is armed
	}
	if err != nil {
		t.Fatal(err)
	}
	log.initiallySet = true // all pages were written, slot 0's are fetched
	if _, err := tr.SyncSlot(0); err != nil {
		t.Fatal(err)
	}
	began, goOn := make(chan struct{}), make(chan struct{})
	log.begun = func(int, uint64) {
		close(began)
		<-goOn
	}
	picked := make(chan uint64)
	go func() {
		_, n, err := tr.Pick(0, 0, 64, make([]uint64, 1))
		if err != nil {
			t.Error(err)
		}
		picked <- n
	}()
	<-began
	log.begun = nil
	if first, n, err := tr.Pick(1, 0, 64, make([]uint64, 1)); n != 64 || first != 0 || err != nil {
		t.Errorf("picked [%#x,+%d) of another slot, %v", first, n, err)
	}
	if taken := tr.Hint(2, 1, 64, 64); taken != 64 {
		t.Errorf("%d pages of a hint were taken", taken)
	}
	if taken := tr.Hint(2, 0, 64, 64); taken != 0 {
		t.Errorf("%d pages of a hint were taken, which had been written", taken)
	}
	if _, err := tr.SyncSlot(1); err != nil {
		t.Error(err)
	}
	tr.Remaining()
	fetched, calls := make(chan error, 1), make(chan struct{})
	go func() {
		close(calls)
		_, err := tr.SyncSlot(0)
		fetched <- err
	}()
	<-calls
	for range 1000 {
		runtime.Gosched()
	}
	select {
	case err := <-fetched:
		t.Errorf("a slot was fetched during a CLEAR of it: %v", err)
	default:
	}
	close(goOn)
	if n := <-picked; n != 64 {
		t.Errorf("picked %d pages", n)
	}
	if err := <-fetched; err != nil {
		t.Error(err)
	}
}

// A guest of 1 TiB that has touched little: what a pass and a sync cost is counted in
// calls.
func TestAPassOverATerabyteOfHoles(t *testing.T) {
	const slotPages, slots = 16 << 30 / mempage.Size, 64
	pages := make([]uint64, slots)
	for i := range pages {
		pages[i] = slotPages
	}
	for _, shift := range []uint{6, 18, 31} {
		ram := newPlainRAM(pages...)
		ram.populated[0].SetRange(300, 100<<20/mempage.Size) // 26 spans of 4 MiB
		ram.populated[7].Set(slotPages / 3)
		ram.populated[63].Set(slotPages - 1)
		log := &plainLog{slots: ram.slots, sparse: true}
		s := newPass(t, ram, log, shift, func(tr *tracker, slot int) error {
			_, err := tr.SyncSlot(slot)
			return err
		})
		s.stage = s.prepare(context.Background(), 0, 0)
		var got []span
		var sent uint64
		for {
			sp, picked := s.take(t)
			if sp.n == 0 {
				break
			}
			got = append(got, sp)
			sent += mempage.Bitmap(picked).Count()
			if sp.first+sp.n > slotPages || ram.populated[sp.slot].NextSet(sp.first, sp.first+sp.n) == sp.first+sp.n {
				t.Errorf("a span of holes was picked: %+v", sp)
			}
		}
		if len(got) != 28 || sent != 28*maxSpan {
			t.Errorf("shift %d: %d pages in %d spans", shift, sent, len(got))
		}
		if left := s.tracker.Remaining(); left != 0 {
			t.Errorf("shift %d: %d pages remain", shift, left)
		}
		if most := slots*slotPages/int(maxClear) + 2*28; ram.looks > most {
			t.Errorf("shift %d: %d times looked for populated pages, expected %d at most", shift, ram.looks, most)
		}
		if log.gets != 0 || log.clears != 0 {
			t.Errorf("shift %d: %d GETs, %d CLEARs", shift, log.gets, log.clears)
		}
		if holes := s.meter.round.PagesHole; holes != slots*slotPages-28*maxSpan {
			t.Errorf("shift %d: %d holes were counted", shift, holes)
		}
	}
}
