package kvm

import (
	"reflect"
	"strings"
	"testing"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// loggedPages is the size of the logged slot. It is not a multiple of 64, so that
// the last word is not full.
const loggedPages = 300

// loggedGuest is a guest in ring 3 that writes to chosen pages of slot 1.
type loggedGuest struct {
	*testGuest
	data []byte
}

// newLoggedGuest makes the guest. protect is CapManualDirtyLogProtect2's argument;
// 0: not enabled. Logging is off.
func newLoggedGuest(t *testing.T, protect uint64) *loggedGuest {
	t.Helper()
	vm := newVM(t)
	if protect != 0 {
		have := must(vm.CheckExtension(CapManualDirtyLogProtect2))(t)
		if uint64(have)&protect != protect {
			wantUnsupported(t, vm.EnableCap(CapManualDirtyLogProtect2, protect), have)
		}
		check(t, vm.EnableCap(CapManualDirtyLogProtect2, protect))
	}
	g := &loggedGuest{data: mapMemory(t, loggedPages*mempage.Size)}
	g.setLogging(t, vm, false)
	g.testGuest = newRing3Guest(t, vm,
		0xfe, 0x03, // incb (%rbx)
		0x88, 0x01, // mov %al, (%rcx): nowhere, so it exits
		0xeb, 0xfa, // and again
	)
	return g
}

// wantUnsupported skips a test on a kernel that is too old for it, after it has
// checked the error.
func wantUnsupported(t *testing.T, err error, have int) {
	t.Helper()
	if err == nil {
		t.Fatalf("the kernel took what it says it does not have (%#x)", have)
	}
	t.Skipf("THIS KERNEL HAS NO SUCH DIRTY LOG, not tested: %v", err)
}

func (g *loggedGuest) setLogging(t *testing.T, vm *VM, on bool) {
	t.Helper()
	slot := MemorySlot{Slot: 1, GPA: dataAt, Size: loggedPages * mempage.Size, HVA: addressOf(g.data)}
	if on {
		slot.Flags = MemLogDirtyPages
	}
	check(t, vm.SetUserMemoryRegion(slot))
}

func (g *loggedGuest) startLogging(t *testing.T) { g.setLogging(t, g.vm, true) }

// write makes the guest write to pages of slot 1.
func (g *loggedGuest) write(t *testing.T, pages ...uint64) {
	t.Helper()
	for _, page := range pages {
		before := g.data[page*mempage.Size]
		check(t, g.SetRegs(Regs{RIP: codeAt, RFLAGS: 2, RBX: dataAt + page*mempage.Size, RCX: nowhere}))
		g.next(t, ExitMMIO)
		g.complete(t)
		if after := g.data[page*mempage.Size]; after != before+1 {
			t.Fatalf("page %d: the guest left %d, want %d", page, after, before+1)
		}
	}
}

// log fetches slot 1's log as page numbers.
func (g *loggedGuest) log(t *testing.T) []uint64 {
	t.Helper()
	bitmap := make([]uint64, mempage.Words(loggedPages))
	check(t, g.vm.GetDirtyLog(1, bitmap))
	return pagesOf(bitmap)
}

func (g *loggedGuest) wantLog(t *testing.T, when string, want ...uint64) {
	t.Helper()
	if got := g.log(t); !reflect.DeepEqual(got, want) {
		t.Errorf("%s: log has pages %v, want %v", when, got, want)
	}
}

// clear clears pages of slot 1 in one call.
func (g *loggedGuest) clear(t *testing.T, pages ...uint64) {
	t.Helper()
	bitmap := make([]uint64, mempage.Words(loggedPages))
	for _, page := range pages {
		bitmap[page/64] |= 1 << (page % 64)
	}
	check(t, g.vm.ClearDirtyLog(1, 0, loggedPages, bitmap))
}

func pagesOf(bitmap []uint64) []uint64 {
	var pages []uint64
	for w, word := range bitmap {
		for i := range uint64(64) {
			if word&(1<<i) != 0 {
				pages = append(pages, uint64(w)*64+i)
			}
		}
	}
	return pages
}

func pageRange(first, end uint64) []uint64 {
	var pages []uint64
	for p := first; p < end; p++ {
		pages = append(pages, p)
	}
	return pages
}

// Under manual protection GET clears nothing. CLEAR clears the given pages and tracks
// them again.
func TestManualProtectGetAndClear(t *testing.T) {
	g := newLoggedGuest(t, DirtyLogManualProtect)
	g.write(t, 3, 64, 299) // before logging is on, and populated
	g.startLogging(t)
	g.wantLog(t, "logging just turned on")
	g.write(t, 3, 64, 299)
	g.wantLog(t, "after writes", 3, 64, 299)
	g.wantLog(t, "GET does not clear", 3, 64, 299)
	g.clear(t, 3, 299)
	g.wantLog(t, "CLEAR of two of three", 64)
	g.write(t, 3)
	g.wantLog(t, "CLEAR re-arms", 3, 64)
	g.clear(t, 3)
	g.write(t, 3, 299)
	g.wantLog(t, "CLEAR re-arms again", 3, 64, 299)
	check(t, g.vm.ClearDirtyLog(1, 64, 64, []uint64{1})) // page 64 alone
	check(t, g.vm.ClearDirtyLog(1, 256, loggedPages-256, []uint64{^uint64(0)}))
	g.wantLog(t, "CLEAR of parts of the slot", 3)
}

// A CLEAR of a bit that is not set does nothing: a later write is logged, and other
// pages do not change.
func TestClearOfUnsetBitIsNoOp(t *testing.T) {
	g := newLoggedGuest(t, DirtyLogManualProtect)
	g.startLogging(t)
	g.write(t, 3)
	g.wantLog(t, "after a write", 3)
	g.clear(t, 5)
	g.wantLog(t, "another page's bit passed", 3)
	g.write(t, 5)
	g.wantLog(t, "that page written", 3, 5)
	g.clear(t, 5)
	g.clear(t, 5)
	g.wantLog(t, "its bit passed twice", 3)
	g.write(t, 5)
	g.wantLog(t, "and written again", 3, 5)
}

// A CLEAR of a bit that was set after the GET loses that write. This is why the
// tracker clears only what it has fetched, and only once.
func TestClearOfUnfetchedBitLosesTheWrite(t *testing.T) {
	g := newLoggedGuest(t, DirtyLogManualProtect)
	g.startLogging(t)
	g.wantLog(t, "before")
	g.write(t, 7)
	g.clear(t, 7) // never fetched
	g.wantLog(t, "the write is lost")
	g.write(t, 7)
	g.wantLog(t, "the next one is not", 7)
	g.clear(t, 7)
	g.write(t, 7)
	g.clear(t, 7) // the same fetch, passed a second time
	g.wantLog(t, "a fetch passed twice loses the write between")
}

// INITIALLY_SET reports every page until it is cleared, then only pages that were
// written.
func TestInitiallySet(t *testing.T) {
	g := newLoggedGuest(t, DirtyLogManualProtect|DirtyLogInitiallySet)
	all := pageRange(0, loggedPages)
	g.write(t, 1)
	g.startLogging(t)
	g.wantLog(t, "logging just turned on", all...)
	g.wantLog(t, "GET does not clear", all...)
	check(t, g.vm.ClearDirtyLog(1, 64, 64, []uint64{^uint64(0)}))
	g.wantLog(t, "64 pages cleared", append(pageRange(0, 64), pageRange(128, loggedPages)...)...)
	g.clear(t, all...)
	g.wantLog(t, "all cleared: each page was reported once")
	g.write(t, 1, 70, 299)
	g.wantLog(t, "cleared pages are tracked", 1, 70, 299)
	g.setLogging(t, g.vm, false)
	g.startLogging(t)
	g.wantLog(t, "turned off and on: all again", all...)
}

// Without manual protection GET clears and tracks again. CLEAR works too: it clears
// bits that no GET has reported.
func TestGetClearsWithoutManualProtect(t *testing.T) {
	g := newLoggedGuest(t, 0)
	g.write(t, 3)
	g.startLogging(t)
	g.wantLog(t, "logging just turned on")
	g.write(t, 3, 130)
	g.wantLog(t, "after writes", 3, 130)
	g.wantLog(t, "GET cleared")
	g.write(t, 3)
	g.wantLog(t, "GET re-armed", 3)
	g.write(t, 3, 130)
	g.clear(t, 3)
	g.wantLog(t, "CLEAR works here as well", 130)
}

// Bitmaps and ranges are checked before the kernel writes or reads them.
func TestDirtyLogBounds(t *testing.T) {
	g := newLoggedGuest(t, DirtyLogManualProtect)
	vm, words := g.vm, mempage.Words(loggedPages)
	err := vm.GetDirtyLog(1, make([]uint64, words))
	wantErr(t, err, unix.ENOENT, "KVM_GET_DIRTY_LOG slot 1: no such file or directory") // logging is off
	g.startLogging(t)
	g.write(t, 299)
	wantErr(t, vm.GetDirtyLog(1, make([]uint64, words-1)), unix.EINVAL,
		"KVM_GET_DIRTY_LOG slot 1: bitmap for 300 pages: expected 5 words or more, got 4: invalid argument")
	wantErr(t, vm.GetDirtyLog(1, nil), unix.EINVAL,
		"KVM_GET_DIRTY_LOG slot 1: bitmap for 300 pages: expected 5 words or more, got 0: invalid argument")
	wantErr(t, vm.GetDirtyLog(9, make([]uint64, words)), unix.ENOENT,
		"KVM_GET_DIRTY_LOG slot 9: no such file or directory")
	long := make([]uint64, words+1)
	long[words] = 0xabad1dea
	check(t, vm.GetDirtyLog(1, long))
	if want := []uint64{0, 0, 0, 0, 1 << (299 - 256), 0xabad1dea}; !reflect.DeepEqual(long, want) {
		t.Errorf("bitmap %#x, want %#x", long, want)
	}

	full := make([]uint64, words)
	for _, c := range []struct {
		first  uint64
		pages  uint32
		bitmap []uint64
		text   string
	}{
		{1, 64, full, "slot 1 pages [0x1,0x41): the first page must be a multiple of 64: invalid argument"},
		{320, 64, full, "slot 1 pages [0x140,0x180): the slot ends at page 0x12c: invalid argument"},
		{256, 64, full, "slot 1 pages [0x100,0x140): the slot ends at page 0x12c: invalid argument"},
		{1 << 63, 64, full, "slot 1 pages [0x8000000000000000,0x8000000000000040): the slot ends at page 0x12c: invalid argument"},
		{0, 65, full, "slot 1 pages [0x0,0x41): expected a multiple of 64 pages, or a range to the slot's end, got 65 pages: invalid argument"},
		{0, 128, full[:1], "slot 1 pages [0x0,0x80): bitmap for 128 pages: expected 2 words or more, got 1: invalid argument"},
		{0, 64, nil, "slot 1 pages [0x0,0x40): bitmap for 64 pages: expected 1 words or more, got 0: invalid argument"},
	} {
		wantErr(t, vm.ClearDirtyLog(1, c.first, c.pages, c.bitmap), unix.EINVAL, "KVM_CLEAR_DIRTY_LOG "+c.text)
	}
	wantErr(t, vm.ClearDirtyLog(3, 0x40000, 0x40000, full), unix.ENOENT,
		"KVM_CLEAR_DIRTY_LOG slot 3 pages [0x40000,0x80000): no such file or directory")
}

// After a slot is deleted or moved, its new size applies.
func TestMemorySlots(t *testing.T) {
	vm := newVM(t)
	mem := mapMemory(t, 128*mempage.Size)
	slot := MemorySlot{Slot: 2, Flags: MemLogDirtyPages, GPA: dataAt, Size: 64 * mempage.Size, HVA: addressOf(mem)}
	check(t, vm.SetUserMemoryRegion(slot))
	check(t, vm.GetDirtyLog(2, make([]uint64, 1)))

	grown := slot
	grown.Size = 128 * mempage.Size
	wantErr(t, vm.SetUserMemoryRegion(grown), unix.EINVAL, "KVM_SET_USER_MEMORY_REGION slot 2 gpa [0x100000,0x180000) hva "+
		hex(slot.HVA)+" flags 0x1: invalid argument")
	check(t, vm.GetDirtyLog(2, make([]uint64, 1))) // still 64 pages

	overlap := slot
	overlap.Slot = 3
	if err := vm.SetUserMemoryRegion(overlap); err == nil || !strings.Contains(err.Error(), "file exists") {
		t.Errorf("overlapping slot: %v", err)
	}
	slot.Size = 0
	check(t, vm.SetUserMemoryRegion(slot))
	wantErr(t, vm.GetDirtyLog(2, make([]uint64, 1)), unix.ENOENT, "KVM_GET_DIRTY_LOG slot 2: no such file or directory")
	check(t, vm.SetUserMemoryRegion(grown))
	wantErr(t, vm.GetDirtyLog(2, make([]uint64, 1)), unix.EINVAL,
		"KVM_GET_DIRTY_LOG slot 2: bitmap for 128 pages: expected 2 words or more, got 1: invalid argument")
}
