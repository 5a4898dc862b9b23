package balloon_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
)

func pages(ranges ...uint64) []mempage.Range {
	var r []mempage.Range
	for i := 0; i < len(ranges); i += 2 {
		r = append(r, mempage.Range{GPA: ranges[i] * 4096, Bytes: ranges[i+1] * 4096})
	}
	return r
}

func TestInflateGivesMemoryBack(t *testing.T) {
	for _, features := range []uint64{allOf, allOf | virtio.FeatureRingPacked | virtio.FeatureEventIdx} {
		r := newRig(t, features)
		r.fill()
		before, err := r.mem.PopulatedPages()
		check(t, err)
		// As Linux does, from the end; one page twice.
		r.pfns(inflate, 905, 904, 903, 902, 902, 300, 100, 101)
		r.noReset()
		if got, want := r.mem.punched(), pages(100, 2, 300, 1, 902, 4); !slices.Equal(got, want) {
			t.Fatalf("punched %v, want %v", got, want)
		}
		after, err := r.mem.PopulatedPages()
		check(t, err)
		if before-after != 7 || r.b.Punched() != 7*4096 {
			t.Errorf("%d pages came back, %d bytes were counted", before-after, r.b.Punched())
		}
		if !r.mem.dirty(t, 904) {
			t.Error("a page that was punched out is not marked: a migration would keep its old content")
		}
		r.pfns(deflate, 905, 904)
		r.noReset()
		check(t, r.mem.WriteAt([]byte("used again"), 904*4096))
	}
}

func TestManyPagesInOneRequest(t *testing.T) {
	r := newRig(t, allOf)
	var pfns []uint32
	for i := range uint32(3000) {
		pfns = append(pfns, 3999-i)
	}
	r.pfns(inflate, pfns...)
	total := uint64(0)
	for _, run := range r.mem.punched() {
		total += run.Bytes
	}
	if total != 3000*4096 {
		t.Errorf("punched %d bytes", total)
	}
	r.noReset()
}

func TestPagesThatAreNotThere(t *testing.T) {
	for name, pfns := range map[string][]uint32{
		"behind RAM":      {1, 1 << 20},
		"the largest":     {1<<32 - 1},
		"in the PCI hole": {0xc0000},
	} {
		t.Run(name, func(t *testing.T) {
			for _, queue := range []int{inflate, deflate} {
				r := newRig(t, allOf)
				r.send(queue, []virtiotest.Buffer{r.put(words(pfns...))}, nil)
				if err := <-r.broken; !errors.Is(err, balloon.ErrPage) {
					t.Error(err)
				}
			}
		})
	}
	r := newRig(t, allOf)
	r.send(inflate, []virtiotest.Buffer{r.put(make([]byte, 7))}, nil)
	if err := <-r.broken; !errors.Is(err, balloon.ErrPage) {
		t.Error(err)
	}
}

// A request has an end: the pages of 4 GiB, and no more.
func TestRequestWithoutEnd(t *testing.T) {
	const most = 1 << 20 // page numbers
	for _, queue := range []int{inflate, deflate} {
		r := newRig(t, allOf)
		b := r.put(words(make([]uint32, most/64)...)) // many times the same numbers
		r.send(queue, slices.Repeat([]virtiotest.Buffer{b}, 64), nil)
		r.wait(queue)
		r.noReset()
		r.send(queue, append(slices.Repeat([]virtiotest.Buffer{b}, 64), virtiotest.Buffer{GPA: b.GPA, Len: 4}), nil)
		if err := <-r.broken; !errors.Is(err, balloon.ErrPage) {
			t.Error(err)
		}
	}
}

// A host that cannot take memory back says so, once, and the guest goes on.
func TestPunchFails(t *testing.T) {
	r := newRig(t, allOf)
	r.mem.fail = errors.New("no")
	r.pfns(inflate, 1, 5)
	r.noReset()
	if n := len(r.logged); n != 1 || r.b.Punched() != 0 {
		t.Errorf("%d lines, %d bytes counted", n, r.b.Punched())
	}
}

func TestReporting(t *testing.T) {
	r := newRig(t, allOf)
	r.fill()
	r.send(report, nil, []virtiotest.Buffer{{GPA: 512 * 4096, Len: 512 * 4096}, {GPA: 7*4096 + 1, Len: 2 * 4096}, {GPA: 4096, Len: 100}})
	r.wait(report)
	if got, want := r.mem.punched(), pages(512, 512, 8, 1); !slices.Equal(got, want) {
		t.Errorf("punched %v, want %v: whole pages only", got, want)
	}
	// A guest that expects a pattern keeps its pages.
	r.writeConfig(12, 0xaaaaaaaa)
	r.send(report, nil, []virtiotest.Buffer{{GPA: 1024 * 4096, Len: 512 * 4096}})
	r.wait(report)
	if got := r.mem.punched(); got != nil {
		t.Errorf("punched %v from a guest that expects 0xaa there", got)
	}
	r.writeConfig(12, 0)
	r.send(report, nil, []virtiotest.Buffer{{GPA: 1024 * 4096, Len: 512 * 4096}})
	r.wait(report)
	if got, want := r.mem.punched(), pages(1024, 512); !slices.Equal(got, want) {
		t.Errorf("punched %v, want %v", got, want)
	}
	r.noReset()
}

// What tests ask for: reported pages are left alone, inflated ones are not.
func TestKeepReported(t *testing.T) {
	r := newRig(t, allOf)
	r.fill()
	r.b.KeepReported()
	r.send(report, nil, []virtiotest.Buffer{{GPA: 512 * 4096, Len: 512 * 4096}})
	r.wait(report)
	if got := r.mem.punched(); got != nil {
		t.Errorf("punched %v of what was to be kept", got)
	}
	r.pfns(inflate, 5)
	if got, want := r.mem.punched(), pages(5, 1); !slices.Equal(got, want) {
		t.Errorf("punched %v by inflation, want %v", got, want)
	}
	r.noReset()
}

// A driver that does not hint may have its reporting queue in the hint queue's
// place.
func TestReportingQueueInThePlaceOfHints(t *testing.T) {
	r := newRig(t, allOf)
	r.b.Reset()
	r.queues[report].Stop()
	check(t, r.b.Activate(r.features&^balloon.FeatureFreePageHint, r.queues, r))
	r.send(hint, nil, []virtiotest.Buffer{{GPA: 0, Len: 4096}})
	r.wait(hint)
	if got := r.mem.punched(); !slices.Equal(got, pages(0, 1)) {
		t.Errorf("punched %v", got)
	}
}

func TestConfiguration(t *testing.T) {
	r := newRig(t, allOf)
	check(t, r.b.SetTarget(5<<20))
	<-r.changed
	if got := r.readConfig(0); got != 5<<8 {
		t.Errorf("the driver reads %d pages", got)
	}
	r.writeConfig(4, 77)
	r.writeConfig(0, 1) // not the driver's
	r.writeConfig(8, 1) // nor this
	r.writeConfig(1<<32-2, 1)
	if r.b.Actual() != 77*4096 || r.b.Target() != 5<<20 || r.readConfig(8) != 0 {
		t.Errorf("actual %d, target %d, command %d", r.b.Actual(), r.b.Target(), r.readConfig(8))
	}
	r.b.WriteConfig(6, []byte{1, 0, 9, 9, 9, 9, 0xbb})
	if r.readConfig(4) != 1<<16|77 || r.readConfig(12) != 0xbb || r.readConfig(14) != 0 || r.readConfig(1<<20) != 0 {
		t.Errorf("actual %#x, poison %#x", r.readConfig(4), r.readConfig(12))
	}
	for _, bad := range []uint64{1, ramBytes, 1 << 60} {
		if err := r.b.SetTarget(bad); err == nil {
			t.Errorf("a target of %d was taken", bad)
		}
	}
	r.b.Reset()
	if r.b.Actual() != 0 || r.b.Target() != 5<<20 || r.readConfig(12) != 0 {
		t.Error("a reset keeps the host's wish, and nothing of the driver's")
	}
}

func TestStateRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		s := balloon.State{
			Target: rng.Uint32N(ramBytes / 4096), Actual: rng.Uint32(), Command: rng.Uint32(),
			LastID: 2 + rng.Uint32N(1<<31), Poison: rng.Uint32(),
		}
		raw, err := strictcbor.Marshal(s)
		check(t, err)
		b, err := balloon.New(balloon.Config{Memory: &guestMemory{}, Puncher: &guestMemory{}, RAM: ramBytes})
		check(t, err)
		check(t, b.LoadState(raw))
		again, err := b.SaveState()
		check(t, err)
		if !bytes.Equal(raw, again) {
			t.Fatalf("saved % x, loaded, saved % x", raw, again)
		}
	}
}

func TestBadState(t *testing.T) {
	b, err := balloon.New(balloon.Config{Memory: &guestMemory{}, Puncher: &guestMemory{}, RAM: ramBytes})
	check(t, err)
	for _, bad := range []any{1, map[string]any{"Else": 1}, balloon.State{Target: ramBytes / 4096}, balloon.State{LastID: 1}} {
		raw, err := strictcbor.Marshal(bad)
		check(t, err)
		if err := b.LoadState(raw); err == nil {
			t.Errorf("%v was taken for a state", bad)
		}
	}
	if err := b.LoadState(nil); err == nil {
		t.Error("nothing was taken for a state")
	}
}

// A pause that there is no time for leaves a device that works.
func TestPauseThatFails(t *testing.T) {
	r := newRig(t, allOf)
	over, cancel := context.WithCancel(context.Background())
	cancel()
	for range 20 {
		if err := r.b.Pause(over); err == nil {
			check(t, r.b.Resume())
		}
		r.pfns(inflate, 1)
		r.pfns(deflate, 1)
		r.free(1, 1)
		r.wait(hint)
	}
	r.noReset()
}
