package kvm

import (
	"errors"
	"reflect"
	"slices"
	"testing"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// newRingGuest makes a guest whose writes are logged in a ring of the given size in
// bytes. Logging is off.
func newRingGuest(t *testing.T, bytes int) *loggedGuest {
	t.Helper()
	vm := newVM(t)
	if most := must(vm.MaxDirtyRing())(t); most == 0 {
		wantUnsupported(t, vm.EnableDirtyRing(mempage.Size), 0)
	}
	check(t, vm.EnableDirtyRing(bytes))
	g := &loggedGuest{data: mapMemory(t, loggedPages*mempage.Size)}
	g.setLogging(t, vm, false)
	g.testGuest = newRing3Guest(t, vm,
		0xfe, 0x03, // incb (%rbx)
		0x88, 0x01, // mov %al, (%rcx): nowhere, so it exits
		0xeb, 0xfa, // and again
	)
	return g
}

// collect takes slot 1's entries, in order.
func (g *loggedGuest) collect(t *testing.T) []uint64 {
	t.Helper()
	var pages []uint64
	n := g.CollectDirty(func(slot uint32, page uint64) {
		if slot != 1 {
			t.Errorf("page %d of slot %d, which is not logged", page, slot)
		}
		pages = append(pages, page)
	})
	if n != len(pages) {
		t.Errorf("%d entries, %d pages", n, len(pages))
	}
	return pages
}

func (g *loggedGuest) wantRing(t *testing.T, when string, want ...uint64) {
	t.Helper()
	if got := g.collect(t); !reflect.DeepEqual(got, want) {
		t.Errorf("%s: the ring has pages %v, want %v", when, got, want)
	}
}

func (g *loggedGuest) reset(t *testing.T, want int) {
	t.Helper()
	if n, err := g.vm.ResetDirtyRings(); n != want || err != nil {
		t.Errorf("reset: %d entries, %v; want %d", n, err, want)
	}
}

// Turning logging on tracks every page. A page is logged once until its entry is
// collected and the rings are reset.
func TestDirtyRing(t *testing.T) {
	g := newRingGuest(t, mempage.Size)
	if g.vm.ringBytes != mempage.Size {
		t.Errorf("a ring of %d bytes", g.vm.ringBytes)
	}
	g.write(t, 3, 64, 299) // before logging is on, and populated
	g.startLogging(t)
	g.wantRing(t, "logging just turned on")
	g.write(t, 3, 299, 3, 64, 3)
	g.reset(t, 0) // nothing was collected
	g.wantRing(t, "after writes", 3, 299, 64)
	g.wantRing(t, "collected once")
	g.write(t, 3)
	g.wantRing(t, "collected and not reset: not tracked")
	g.reset(t, 3)
	g.wantRing(t, "reset")
	g.write(t, 3)
	g.write(t, 5) // never populated before
	g.wantRing(t, "tracked again", 3, 5)
	g.write(t, 64)
	g.reset(t, 2) // 64 is not collected, and remains
	g.wantRing(t, "an entry that the reset left", 64)
	g.reset(t, 1)
	g.setLogging(t, g.vm, false)
	g.write(t, 3, 7)
	g.wantRing(t, "logging is off")
	g.startLogging(t)
	g.write(t, 7)
	g.wantRing(t, "and on again", 7)
}

// Entries remain after the end of logging, and can be reset.
func TestDirtyRingAfterLogging(t *testing.T) {
	g := newRingGuest(t, mempage.Size)
	g.startLogging(t)
	g.write(t, 1, 2)
	g.setLogging(t, g.vm, false)
	g.wantRing(t, "after the end", 1, 2)
	g.reset(t, 2)
	slot := MemorySlot{Slot: 1, GPA: dataAt, HVA: addressOf(g.data)}
	check(t, g.vm.SetUserMemoryRegion(slot)) // deleted
	g.reset(t, 0)
}

// The ring wraps: more writes than it has entries, collected in time.
func TestDirtyRingGoesRound(t *testing.T) {
	g := newRingGuest(t, mempage.Size) // 256 entries
	g.startLogging(t)
	for range 5 {
		for page := range uint64(100) {
			g.write(t, page)
		}
		g.wantRing(t, "a hundred pages", pageRange(0, 100)...)
		g.reset(t, 100)
	}
}

// A full ring ends every KVM_RUN with KVM_EXIT_DIRTY_RING_FULL until it is collected
// and reset. No entry is lost.
func TestDirtyRingFull(t *testing.T) {
	g := newRingGuest(t, mempage.Size)
	g.startLogging(t)
	var written, collected []uint64
	full := 0
	for page := uint64(0); page < loggedPages; {
		check(t, g.SetRegs(Regs{RIP: codeAt, RFLAGS: 2, RBX: dataAt + page*mempage.Size, RCX: nowhere}))
		err := g.Run()
		if errors.Is(err, unix.EINTR) {
			continue
		}
		check(t, err)
		switch reason := g.ExitReason(); reason {
		case ExitMMIO:
			g.complete(t)
			written = append(written, page)
			page++
		case ExitDirtyRingFull:
			full++
			check(t, func() error { _, err := g.vm.ResetDirtyRings(); return err }()) // nothing is collected, so no effect
			if err := g.Run(); !errors.Is(err, unix.EINTR) && (err != nil || g.ExitReason() != ExitDirtyRingFull) {
				t.Fatalf("a full ring that was not collected: %v, %v", err, g.ExitReason())
			}
			before := len(collected)
			collected = append(collected, g.collect(t)...)
			g.reset(t, len(collected)-before)
		default:
			t.Fatalf("exit %v", reason)
		}
	}
	if full == 0 {
		t.Errorf("%d pages did not fill a ring of %d places", loggedPages, mempage.Size/dirtyRingEntrySize)
	}
	collected = append(collected, g.collect(t)...)
	slices.Sort(collected)
	if collected = slices.Compact(collected); !reflect.DeepEqual(collected, written) {
		t.Errorf("wrote %v\ncollected %v", written, collected)
	}
}

// With rings there is no bitmap, and rings must be enabled before the first vCPU.
func TestDirtyRingExcludesTheBitmap(t *testing.T) {
	g := newRingGuest(t, mempage.Size)
	g.startLogging(t)
	g.write(t, 3)
	if err := g.vm.GetDirtyLog(1, make([]uint64, mempage.Words(loggedPages))); !errors.Is(err, unix.ENXIO) {
		t.Errorf("GET: %v", err)
	}
	if err := g.vm.ClearDirtyLog(1, 0, 64, []uint64{1}); !errors.Is(err, unix.ENXIO) {
		t.Errorf("CLEAR: %v", err)
	}
	if err := g.vm.EnableDirtyRing(2 * mempage.Size); !errors.Is(err, unix.EINVAL) {
		t.Errorf("a second size: %v", err)
	}
	vm := newVM(t)
	newVCPU(t, vm)
	if err := vm.EnableDirtyRing(mempage.Size); !errors.Is(err, unix.EINVAL) {
		t.Errorf("after the first vCPU: %v", err)
	}
	if _, err := vm.ResetDirtyRings(); err == nil {
		t.Error("a VM without rings was reset")
	}
}

func TestDirtyRingSizes(t *testing.T) {
	vm := newVM(t)
	most := must(vm.MaxDirtyRing())(t)
	if most == 0 {
		wantUnsupported(t, vm.EnableDirtyRing(mempage.Size), 0)
	}
	for _, bytes := range []int{-1, 0, 16, mempage.Size / 2, mempage.Size + 16, 2 * most} {
		if err := vm.EnableDirtyRing(bytes); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%d bytes: %v", bytes, err)
		}
	}
	check(t, vm.EnableDirtyRing(most))
}
