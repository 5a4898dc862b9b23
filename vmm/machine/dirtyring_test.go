package machine

import (
	"errors"
	"maps"
	"math/bits"
	"sync"
	"testing"

	"github.com/govmm/govmm/internal/testhook"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/vmm/memory"
	"pgregory.net/rapid"
)

// slotsOf returns memory slots with these numbers of pages.
func slotsOf(pages ...uint64) (slots []memory.Slot) {
	for _, n := range pages {
		slots = append(slots, memory.Slot{Size: n * mempage.Size})
	}
	return slots
}

// fakeRings is a kernel whose rings never fill up.
type fakeRings struct {
	mu      sync.Mutex // guards all below
	entries [][2]uint64
	taken   [][2]uint64 // collected, and not reset
	armed   map[[2]uint64]bool
	broken  error
	resets  int
	looks   int // calls of CollectDirty
}

func newFakeRings(pages []uint64) *fakeRings {
	k := &fakeRings{armed: map[[2]uint64]bool{}}
	for slot, n := range pages {
		for page := range n {
			k.armed[[2]uint64{uint64(slot), page}] = true
		}
	}
	return k
}

func (k *fakeRings) write(slot, page uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if p := [2]uint64{slot, page}; k.armed[p] {
		k.armed[p] = false
		k.entries = append(k.entries, p)
	}
}

func (k *fakeRings) CollectDirty(f func(uint32, uint64)) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.looks++
	n := len(k.entries)
	for _, e := range k.entries {
		f(uint32(e[0]), e[1])
	}
	k.taken = append(k.taken, k.entries...)
	k.entries = nil
	return n
}

func (k *fakeRings) ResetDirtyRings() (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.broken != nil {
		return 0, k.broken
	}
	k.resets++
	n := len(k.taken)
	for _, p := range k.taken {
		k.armed[p] = true
	}
	k.taken = nil
	return n, nil
}

// fetchRings takes a slot's log into a bitmap.
func fetchRings(r *dirtyRings, slot int, bitmap []uint64) error {
	clear(bitmap)
	return r.take(slot, func(w int, word uint64) { bitmap[w] = word })
}

// TestDirtyRingsReportEveryWrite: in any order of writes, full rings and fetches, a
// fetch reports every page that was written since the last fetch of the slot, and each
// page that it reports is armed when it returns.
func TestDirtyRingsReportEveryWrite(t *testing.T) {
	pages := []uint64{130, 64, 7}
	rapid.Check(t, func(t *rapid.T) {
		k := newFakeRings(pages)
		r := newDirtyRings(k, slotsOf(pages...))
		r.vcpus = []ringVCPU{k}
		owed := map[[2]uint64]bool{} // written and not reported since
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			slot := rapid.IntRange(0, len(pages)-1).Draw(t, "slot")
			switch rapid.IntRange(0, 6).Draw(t, "step") {
			case 0: // a ring is full
				if err := r.harvest(); err != nil {
					t.Fatal(err)
				}
			case 1:
				bitmap := make([]uint64, (pages[slot]+63)/64+1)
				for i := range bitmap {
					bitmap[i] = ^uint64(0) // left over from an earlier use
				}
				if err := fetchRings(r, slot, bitmap); err != nil {
					t.Fatal(err)
				}
				for w, word := range bitmap {
					for ; word != 0; word &= word - 1 {
						p := [2]uint64{uint64(slot), uint64(w*64 + bits.TrailingZeros64(word))}
						if !owed[p] {
							t.Fatalf("page %v was not written and is reported", p)
						}
						if !k.armed[p] {
							t.Fatalf("page %v is reported and not armed", p)
						}
						delete(owed, p)
					}
				}
				for p := range owed {
					if p[0] == uint64(slot) {
						t.Fatalf("the write to page %v is lost", p)
					}
				}
			case 2:
				if err := r.drop(); err != nil {
					t.Fatal(err)
				}
				clear(owed)
			case 3: // a sync of all slots, during which the guest writes
				before, looks := maps.Clone(owed), k.looks
				if err := r.collect(); err != nil {
					t.Fatal(err)
				}
				for slot, n := range pages {
					page := rapid.Uint64Range(0, n-1).Draw(t, "meanwhile")
					k.write(uint64(slot), page)
					late := [2]uint64{uint64(slot), page}
					owed[late] = true
					if err := r.take(slot, func(w int, word uint64) {
						for ; word != 0; word &= word - 1 {
							p := [2]uint64{uint64(slot), uint64(w*64 + bits.TrailingZeros64(word))}
							if !before[p] {
								t.Fatalf("page %v was not written and is reported", p)
							}
							delete(before, p)
							if p != late { // which was written again
								delete(owed, p)
							}
						}
					}); err != nil {
						t.Fatal(err)
					}
				}
				if len(before) > 0 {
					t.Fatalf("writes before the sync are lost: %v", before)
				}
				if k.looks != looks+1 {
					t.Fatalf("a sync of %d slots looked into the rings %d times", len(pages), k.looks-looks)
				}
			default:
				page := rapid.Uint64Range(0, pages[slot]-1).Draw(t, "page")
				k.write(uint64(slot), page)
				owed[[2]uint64{uint64(slot), page}] = true
			}
		}
	})
}

// TestDirtyRingsStayInBounds: entries out of bounds are ignored. A reset that fails is
// an error, and what was collected before it is kept.
func TestDirtyRingsStayInBounds(t *testing.T) {
	k := newFakeRings([]uint64{64})
	r := newDirtyRings(k, slotsOf(64))
	r.vcpus = []ringVCPU{k}
	k.entries = [][2]uint64{{0, 64}, {0, 1 << 63}, {1, 0}, {1 << 16, 0}, {0, 5}}
	bitmap := make([]uint64, 1)
	check(t, fetchRings(r, 0, bitmap))
	if bitmap[0] != 1<<5 {
		t.Errorf("bitmap %#x", bitmap)
	}
	if k.resets != 1 {
		t.Errorf("%d resets", k.resets)
	}
	check(t, fetchRings(r, 0, bitmap))
	if bitmap[0] != 0 || k.resets != 1 {
		t.Errorf("nothing was written: bitmap %#x, %d resets", bitmap, k.resets)
	}
	for _, slot := range []int{-1, 1} {
		if fetchRings(r, slot, bitmap) == nil {
			t.Errorf("slot %d was fetched", slot)
		}
	}
	k.write(0, 9)
	k.broken = errors.New("broken on purpose")
	if err := fetchRings(r, 0, bitmap); !errors.Is(err, k.broken) {
		t.Errorf("fetch: %v", err)
	}
	k.broken = nil
	check(t, fetchRings(r, 0, bitmap))
	if bitmap[0] != 1<<9 {
		t.Errorf("after a failed reset: bitmap %#x", bitmap)
	}
}

// TestRingLog: entries of a machine's rings arrive in the log that is fetched.
func TestRingLog(t *testing.T) {
	spec := testSpec(t, 2, vmtest.WakeAndCount)
	spec.Tracking = TrackRing
	m, err := New(spec, Ends{}, vmtest.Log(t))
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skipf("THIS KERNEL HAS NO DIRTY RING, not tested: %v", err)
	}
	check(t, err)
	t.Cleanup(func() { check(t, m.Close()) })
	if m.Tracking() != TrackRing || m.ManualProtect() {
		t.Fatalf("tracking by %s, manual protection %v", m.Tracking(), m.ManualProtect())
	}
	check(t, m.Boot())
	startCounting(t, m)
	src := m.Source()
	log := make([]uint64, src.Slots()[0].Pages/64)
	check(t, src.StartDirtyLog())
	awaitChange(t, m, vmtest.CountAt, word(t, m, vmtest.CountAt))
	awaitChange(t, m, vmtest.APCountAt, word(t, m, vmtest.APCountAt))
	check(t, src.FetchDirtyLog(0, log))
	for _, p := range []int{vmtest.APCountAt >> 12, vmtest.CountAt >> 12} {
		if log[p/64]&(1<<(p%64)) == 0 {
			t.Errorf("the guest wrote page %#x, the log does not have it", p)
		}
	}
	if m.kernel.rings.entries == 0 {
		t.Error("no entry of a ring was collected")
	}
	check(t, src.StopDirtyLog())
}

// TestTrackAuto takes the bitmap where the kernel has manual protection, otherwise
// the ring if the kernel has one.
func TestTrackAuto(t *testing.T) {
	spec := testSpec(t, 1, vmtest.JustCount)
	m := fromSpec(t, spec, nil)
	manual, err := m.kernel.vm.CheckExtension(kvm.CapManualDirtyLogProtect2)
	check(t, err)
	ring, err := m.kernel.vm.MaxDirtyRing()
	check(t, err)
	if manual != 0 && (m.Tracking() != TrackBitmap || !m.ManualProtect()) {
		t.Errorf("with manual protection: tracking by %s", m.Tracking())
	}
	testhook.WithoutDirtyLog.Store(int64(manual))
	defer testhook.WithoutDirtyLog.Store(0)
	want := TrackBitmap
	if ring != 0 {
		want = TrackRing
	}
	if m := fromSpec(t, spec, nil); m.Tracking() != want || m.ManualProtect() {
		t.Errorf("without manual protection: tracking by %s, want %s", m.Tracking(), want)
	}
}

func TestParseDirtyTracking(t *testing.T) {
	for s, want := range map[string]DirtyTracking{"": TrackAuto, "auto": TrackAuto, "bitmap": TrackBitmap, "ring": TrackRing} {
		if got, err := ParseDirtyTracking(s); got != want || err != nil {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	if _, err := ParseDirtyTracking("Ring"); err == nil {
		t.Error("Ring was taken")
	}
}

// TestGateFlush: a flush gets each running vCPU out of the guest once. It does not wait
// for a vCPU that stands still, nor forever for one that does not come.
func TestGateFlush(t *testing.T) {
	g, runs := spinning(t, 2)
	awaitRuns(t, runs, 1)
	for n := range int64(20) {
		g.flush(patience)
		awaitRuns(t, runs, n+2)
	}
	if g.closed.Load() {
		t.Error("the gate stays closed")
	}
	if _, err := g.hold(t.Context(), holdUser, 0); err != nil {
		t.Fatal(err)
	}
	before := runs[0].Load()
	g.flush(patience)
	if runs[0].Load() != before {
		t.Error("a flush has let a held vCPU run")
	}
	check(t, g.release(holdUser, 0, func() {}))
	g.enter() // one that never comes
	g.flush(1)
	g.leave()
	awaitRuns(t, runs, before+1)
}
