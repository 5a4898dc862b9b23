package memory

import (
	"errors"
	"fmt"
	"math/bits"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// Memory that comes later: the guest runs while the content of some of its pages is
// elsewhere. Who touches such a page waits until it has come.
//
// vCPUs, and whatever else the kernel does for this process, wait in the kernel: the pages
// do not exist, and userfaultfd reports the fault. Go code must not: a thread that faults
// keeps its processor, and the garbage collector waits for it, while the page is fetched by
// goroutines of the same process. So every method of [Memory] that gives access to memory
// asks first ([Missing.await]), and makes sure that the pages exist: where a page
// that is not missing does not exist either, a system call makes it, of which the collector
// knows. Until all have come no page is given back to the host, so what exists stays.
//
// The rules, of each page:
//   - It is made, with its content, in one step of the kernel, which does nothing if it
//     exists (UFFDIO_COPY). So what the guest has written is never overwritten. Huge pages
//     come otherwise, see [hugeMissing].
//   - Its bit in absent is cleared after it was made. Who clears it without making it (the
//     page is zero, or the guest has given it up) has claimed it before, and who lands it
//     claims it, too: so nothing lands later.

const pageBytes = mempage.Size

// errNoMissing is what one gets who waits for a page when the memory is given up.
var errNoMissing = errors.New("the rest of the guest's memory does not come")

// Missing is what a [Memory] still lacks. It is made by [Memory.Miss].
type Missing struct {
	mem    *Memory
	faults uffd
	want   func(slot int, first, n uint64)
	slots  []missingSlot
	left   atomic.Int64 // pages that have not come
	grain  uint64       // how many pages exist together or not at all
	huge   *hugeMissing // nil unless grain is that of huge pages

	waitMu  sync.Mutex          // guards the fields below
	came    sync.Cond           // something has come, or it is over
	over    bool                // nothing more comes
	waiting map[uint64][]waiter // by the first page of a grain, counted from the start of the memory
	stalls  Stalls

	landing sync.WaitGroup // of those who change memory; over keeps others away
	gone    chan struct{}  // closed when nothing is missing any more, or by Stop
	wake    int            // an eventfd, which ends watch
	watcher sync.WaitGroup
	failed  atomic.Pointer[error] // of watch
}

// missingSlot is one slot's part. Its bitmaps are accessed atomically.
type missingSlot struct {
	absent  []uint64 // the page has not come
	claimed []uint64 // somebody is bringing it, or has
	exists  []uint64 // the page is known to exist, and will until nothing is missing
	asked   []uint64 // want was called for it; guarded by waitMu
}

// round returns the grains that a range of pages of a slot touches.
func (x *Missing) round(first, n uint64) (uint64, uint64) {
	start := first &^ (x.grain - 1)
	return start, (first+n+x.grain-1)&^(x.grain-1) - start
}

// waiter is a thread that waits for a page, by a fault.
type waiter struct {
	since  time.Time
	thread uint32
}

// CheckMissing reports what keeps memory of this backing from coming later.
func CheckMissing(b Backing) error {
	f, err := takeFaults()
	if err != nil {
		return err
	}
	f.giveBack()
	if b == Hugetlb && !f.huge {
		return fmt.Errorf("memory of backing %s that comes later needs a userfaultfd with UFFD_FEATURE_MINOR_HUGETLBFS, and Linux 5.18; use %s or %s", b, Anonymous, Memfd)
	}
	return nil
}

// Drop forgets the content of pages that will be missing, before a [Memory.Miss], so that
// this has less to do. Bit i of pages is page i of the slot. No guest runs. Huge pages stay.
func (m *Memory) Drop(index int, pages []uint64) error {
	s, err := m.pageRange(index, 0, 0)
	if err != nil {
		return err
	}
	if uint64(len(pages)) < mempage.Words(s.pages()) {
		return fmt.Errorf("drop pages of memory slot %d: bitmap of %d words, expected %d", index, len(pages), mempage.Words(s.pages()))
	}
	if m.backing == Hugetlb {
		return nil
	}
	// khugepaged must not fill what is dropped with a huge page of zeros.
	if err := unix.Madvise(s.ram, unix.MADV_NOHUGEPAGE); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("madvise guest memory, MADV_NOHUGEPAGE: %w", err)
	}
	set := mempage.Bitmap(pages)
	end := s.pages()
	var wrong error
	err = m.eachPopulated(s, 0, end, func(at, n uint64) bool {
		for p := set.NextSet(at, at+n); p < at+n && wrong == nil; {
			stop := set.NextClear(p, at+n)
			wrong = m.Zero(index, p, stop-p)
			p = set.NextSet(stop, at+n)
		}
		return wrong == nil
	})
	return errors.Join(err, wrong)
}

// Miss makes pages missing, whose content is dropped: bit i of missing[slot] is page i of
// the slot. No guest runs, and nobody has a slice of the memory. want is called, by any
// goroutine and by several at once, for missing pages that somebody waits for, once for
// each; it must not wait.
func (m *Memory) Miss(missing [][]uint64, want func(slot int, first, n uint64)) (*Missing, error) {
	if err := CheckMissing(m.backing); err != nil {
		return nil, err
	}
	if len(missing) != len(m.slots) || m.missing.Load() != nil {
		return nil, fmt.Errorf("make guest memory missing: %d bitmaps for %d slots, missing already: %v", len(missing), len(m.slots), m.missing.Load() != nil)
	}
	x := &Missing{mem: m, want: want, grain: 1, waiting: map[uint64][]waiter{}, gone: make(chan struct{}), wake: -1}
	x.came.L = &x.waitMu
	x.stalls.Threads = map[uint32]time.Duration{}
	for i := range m.slots {
		words := mempage.Words(m.slots[i].pages())
		if uint64(len(missing[i])) < words {
			return nil, fmt.Errorf("make guest memory missing: bitmap of %d words for memory slot %d, expected %d", len(missing[i]), i, words)
		}
		s := missingSlot{absent: slices.Clone(missing[i][:words]), claimed: make([]uint64, words), exists: make([]uint64, words), asked: make([]uint64, words)}
		if tail := m.slots[i].pages() % 64; tail != 0 {
			s.absent[words-1] &= 1<<tail - 1
		}
		x.slots = append(x.slots, s)
		x.left.Add(int64(mempage.Bitmap(s.absent).Count()))
	}
	if x.left.Load() == 0 {
		close(x.gone)
		x.over = true
		return x, nil
	}
	var err error
	if x.faults, err = takeFaults(); err != nil {
		return nil, err
	}
	if x.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		x.faults.giveBack()
		return nil, fmt.Errorf("eventfd, for memory that comes later: %w", err)
	}
	if err := x.begin(); err != nil {
		return nil, errors.Join(err, x.release())
	}
	x.watcher.Go(x.watch)
	m.missing.Store(x)
	return x, nil
}

// begin registers all memory, and drops what is missing of it: again, where [Memory.Drop]
// has.
func (x *Missing) begin() error {
	mode := uint64(registerMissing)
	if x.mem.backing == Hugetlb {
		if err := x.openHuge(); err != nil {
			return err
		}
		mode |= registerMinor
	}
	for i := range x.mem.slots {
		s := &x.mem.slots[i]
		if err := x.faults.register(s.HVA, s.Size, mode); err != nil {
			return fmt.Errorf("UFFDIO_REGISTER of memory slot %d: %w", i, err)
		}
		if err := x.mem.Drop(i, x.slots[i].absent); err != nil {
			return err
		}
	}
	return x.hideHuge()
}

// release ends the registration. Whoever waits in the kernel goes on.
func (x *Missing) release() error {
	errs := []error{x.zeroHuge()}
	for i := range x.mem.slots {
		s := &x.mem.slots[i]
		if err := x.faults.unregister(s.HVA, s.Size); err != nil {
			errs = append(errs, fmt.Errorf("UFFDIO_UNREGISTER of memory slot %d: %w", i, err))
		}
		if err := unix.Madvise(s.ram, unix.MADV_HUGEPAGE); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("madvise guest memory, MADV_HUGEPAGE: %w", err))
		}
	}
	if x.wake >= 0 {
		_ = unix.Close(x.wake)
	}
	err := errors.Join(errs...)
	if err == nil {
		x.faults.giveBack()
	} else {
		_ = unix.Close(x.faults.fd)
	}
	return errors.Join(err, x.closeHuge())
}

// Missing returns what the memory lacks, or nil: then, and for all time if the guest came
// without, it lacks nothing.
func (m *Memory) Missing() *Missing { return m.missing.Load() }

// Left is the number of pages that have not come.
func (x *Missing) Left() uint64 { return uint64(max(x.left.Load(), 0)) }

// Gone is closed when nothing is missing any more, or the memory is given up.
func (x *Missing) Gone() <-chan struct{} { return x.gone }

// Lacks stores which pages of a slot have not come: word i is that of pages 64*i and following.
func (x *Missing) Lacks(index int, words []uint64) {
	for i := range min(len(words), len(x.slots[index].absent)) {
		words[i] = atomic.LoadUint64(&x.slots[index].absent[i])
	}
}

// Anew makes want be called again for what is waited for and has not come: what was asked
// for before may be lost.
func (x *Missing) Anew() {
	x.waitMu.Lock()
	for i := range x.slots {
		clear(x.slots[i].asked)
	}
	pages := make([]uint64, 0, len(x.waiting))
	for p := range x.waiting {
		pages = append(pages, p)
	}
	x.came.Broadcast() // they ask again
	x.waitMu.Unlock()
	for _, p := range pages {
		index, at := x.mem.at(p << mempage.Shift)
		x.ask(index, at>>mempage.Shift, 1)
	}
}

// enter keeps the memory from being given up until leave.
func (x *Missing) enter() bool {
	x.waitMu.Lock()
	defer x.waitMu.Unlock()
	if !x.over {
		x.landing.Add(1)
	}
	return !x.over
}

func (x *Missing) leave() { x.landing.Done() }

// Land brings pages: page first+i has the content at i pages of content, for each bit of
// pages. Those that are not missing, or have come, are left out. content is on the heap.
func (x *Missing) Land(index int, first uint64, pages []uint64, content []byte) error {
	return x.bring(index, first, uint64(len(content))/pageBytes, pages, func(at, n uint64) error {
		s := &x.mem.slots[index]
		off := at - first
		if x.huge != nil {
			return x.huge.write(s, at, content[off<<mempage.Shift:(off+n)<<mempage.Shift])
		}
		if err := x.faults.place(s.HVA+uintptr(at<<mempage.Shift), content[off<<mempage.Shift:(off+n)<<mempage.Shift]); err != nil {
			return fmt.Errorf("UFFDIO_COPY of %d pages at page %#x of memory slot %d: %w", n, at, index, err)
		}
		setBits(x.slots[index].exists, at, n)
		return nil
	})
}

// LandZero is Land for pages that read as zero. They come to exist when they are touched.
func (x *Missing) LandZero(index int, first, n uint64, pages []uint64) error {
	return x.bring(index, first, n, pages, func(at, n uint64) error {
		if x.huge != nil {
			return x.huge.clear(&x.mem.slots[index], at, n)
		}
		return nil
	})
}

// bring claims the pages of [first, first+n) that have not come, makes each run of them,
// and lets all go on that wait for them.
func (x *Missing) bring(index int, first, n uint64, pages []uint64, made func(at, n uint64) error) error {
	if _, err := x.mem.pageRange(index, first, n); err != nil {
		return err
	}
	if first%64 != 0 || uint64(len(pages)) < mempage.Words(n) {
		return fmt.Errorf("memory that comes later: pages from %#x by a bitmap of %d words", first, len(pages))
	}
	if !x.enter() {
		if x.Left() == 0 {
			return nil // all have come
		}
		return errNoMissing
	}
	defer x.leave()
	s := &x.slots[index]
	for i := range mempage.Words(n) {
		w := first/64 + i
		mine := pages[i] & mempage.WordMask(w, first, first+n) & atomic.LoadUint64(&s.absent[w])
		mine &^= atomic.OrUint64(&s.claimed[w], mine)
		for left := mine; left != 0; {
			lo := bits.TrailingZeros64(left)
			run := bits.TrailingZeros64(^(left >> lo))
			if err := made(w*64+uint64(lo), uint64(run)); err != nil {
				err = errors.Join(err, x.have(index, w, mine&^left))
				atomic.AndUint64(&s.claimed[w], ^left) // they may come again
				return err
			}
			if lo+run >= 64 {
				break
			}
			left &^= (1<<run - 1) << lo
		}
		if err := x.have(index, w, mine); err != nil {
			return err
		}
	}
	return nil
}

// have notes that pages of a word have come.
func (x *Missing) have(index int, w, mine uint64) error {
	if mine == 0 {
		return nil
	}
	s := &x.slots[index]
	atomic.AndUint64(&s.absent[w], ^mine)
	whole, err := x.cameHuge(index, w, mine)
	left := x.left.Add(-int64(bits.OnesCount64(mine)))
	x.waitMu.Lock()
	base := (x.mem.slots[index].off >> mempage.Shift) + w*64
	var woken []uint64
	if whole && len(x.waiting) > 0 {
		for left := mine; left != 0; left &= left - 1 {
			p := (base + uint64(bits.TrailingZeros64(left))) &^ (x.grain - 1)
			if list, ok := x.waiting[p]; ok {
				for _, f := range list {
					x.stalls.add(f, time.Now())
				}
				delete(x.waiting, p)
				woken = append(woken, p)
			}
		}
	}
	x.came.Broadcast()
	if left == 0 && !x.over {
		x.over = true
		go x.finish()
	}
	x.waitMu.Unlock()
	for _, p := range woken { // those that were made are awake; a page of zeros is made when it is touched
		_ = x.faults.wake(x.mem.slots[index].HVA+uintptr((p-x.mem.slots[index].off>>mempage.Shift)<<mempage.Shift), x.grain*pageBytes)
	}
	return err
}

// finish ends what is over: by Stop, or since all have come.
func (x *Missing) finish() {
	x.landing.Wait()
	if x.wake >= 0 {
		_, _ = unix.Write(x.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		x.watcher.Wait()
		if err := x.release(); err != nil && x.failed.Load() == nil {
			x.failed.Store(&err)
		}
	}
	x.waitMu.Lock()
	x.came.Broadcast()
	x.waitMu.Unlock()
	x.mem.missing.CompareAndSwap(x, nil)
	close(x.gone)
}

// Stop gives up what has not come: it reads as zero, and who waits for it through a method
// of [Memory] gets an error. It returns when all of that is done.
func (x *Missing) Stop() error {
	x.waitMu.Lock()
	first := !x.over
	x.over = true
	x.came.Broadcast()
	x.waitMu.Unlock()
	if first {
		x.finish()
	}
	<-x.gone
	return x.Err()
}

// Err returns what went wrong where no caller is told.
func (x *Missing) Err() error {
	if err := x.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// watch handles the faults that the kernel reports.
func (x *Missing) watch() {
	buf, list := make([]byte, 16*faultMessageSize), []fault(nil)
	for {
		var err error
		if list, err = x.faults.read(x.wake, buf, list); err != nil {
			err = fmt.Errorf("read a userfaultfd: %w", err)
			x.failed.Store(&err)
			return
		}
		if len(list) == 0 {
			return
		}
		for _, f := range list {
			if err := x.fault(f); err != nil {
				x.failed.Store(&err)
			}
		}
		// Who was asked goes first: this goroutine is about to wait in the kernel, which the
		// runtime may notice only some milliseconds later.
		runtime.Gosched()
	}
}

// fault handles one. A page that is missing is asked for, another one is zero.
func (x *Missing) fault(f fault) error {
	index := slices.IndexFunc(x.mem.slots, func(s slot) bool { return f.addr-s.HVA < uintptr(s.Size) })
	if index < 0 {
		return fmt.Errorf("a fault at %#x, which is no guest memory", f.addr)
	}
	s := &x.mem.slots[index]
	page, _ := x.round(uint64(f.addr-s.HVA)>>mempage.Shift, 1)
	x.waitMu.Lock()
	missing := anyBits(x.slots[index].absent, page, x.grain)
	if missing { // under waitMu: whoever brings it looks for waiters afterwards
		p := s.off>>mempage.Shift + page
		x.waiting[p] = append(x.waiting[p], waiter{time.Now(), f.thread})
	}
	x.waitMu.Unlock()
	if !missing {
		x.stallsZero()
		if x.huge != nil {
			return x.makeHuge(s, page)
		}
		if err := x.faults.zero(s.HVA+uintptr(page<<mempage.Shift), pageBytes); err != nil {
			return fmt.Errorf("UFFDIO_ZEROPAGE at page %#x of memory slot %d: %w", page, index, err)
		}
		return nil
	}
	x.ask(index, page, 1)
	return nil
}

// ask calls want for the missing pages of a range for which it has not been called.
func (x *Missing) ask(index int, first, n uint64) {
	s := &x.slots[index]
	first, n = x.round(first, n)
	var runs [][2]uint64
	x.waitMu.Lock()
	for p := first; p < first+n; p++ {
		w, bit := p/64, uint64(1)<<(p%64)
		if atomic.LoadUint64(&s.absent[w])&bit == 0 || s.asked[w]&bit != 0 {
			continue
		}
		s.asked[w] |= bit
		if k := len(runs); k > 0 && runs[k-1][0]+runs[k-1][1] == p {
			runs[k-1][1]++
		} else {
			runs = append(runs, [2]uint64{p, 1})
		}
	}
	x.waitMu.Unlock()
	for _, r := range runs {
		x.want(index, r[0], r[1])
	}
}

// await returns when the pages of m.ram[off:off+n] have come and exist, so that no access
// to them faults.
func (m *Memory) await(off, n uint64) error {
	x := m.missing.Load()
	if x == nil || n == 0 {
		return nil
	}
	first, behind := off>>mempage.Shift, (off+n-1)>>mempage.Shift+1
	for first < behind {
		index, at := m.at(first << mempage.Shift)
		page := at >> mempage.Shift
		count := min(behind-first, m.slots[index].pages()-page)
		if err := x.await(index, page, count); err != nil {
			return err
		}
		first += count
	}
	return nil
}

func (x *Missing) await(index int, first, n uint64) error {
	s := &x.slots[index]
	if allBits(s.exists, first, n) {
		return nil
	}
	first, n = x.round(first, n)
	for anyBits(s.absent, first, n) {
		x.ask(index, first, n)
		x.waitMu.Lock()
		for !x.over && anyBits(s.absent, first, n) && !x.unasked(s, first, n) {
			x.came.Wait()
		}
		over := x.over
		x.waitMu.Unlock()
		if over && anyBits(s.absent, first, n) {
			return errNoMissing
		}
	}
	if !x.enter() {
		<-x.gone // from then on an access does not fault here
		return nil
	}
	defer x.leave()
	ram := x.mem.slots[index].ram[first<<mempage.Shift : (first+n)<<mempage.Shift]
	if err := retryEINTR(func() error { return unix.Madvise(ram, unix.MADV_POPULATE_WRITE) }); err != nil {
		return fmt.Errorf("MADV_POPULATE_WRITE of %d pages at page %#x of memory slot %d: %w", n, first, index, err)
	}
	setBits(s.exists, first, n)
	return nil
}

// unasked reports whether a page of the range has to be asked for again. It needs waitMu.
func (x *Missing) unasked(s *missingSlot, first, n uint64) bool {
	for p := first; p < first+n; p++ {
		bit := uint64(1) << (p % 64)
		if atomic.LoadUint64(&s.absent[p/64])&bit != 0 && s.asked[p/64]&bit == 0 {
			return true
		}
	}
	return false
}

// giveUp is what a guest's balloon does with pages while others are missing: they are zero,
// and come no more. Those that exist stay, and are cleared: somebody may be about to access
// them.
func (x *Missing) giveUp(index int, first, n uint64) error {
	s := &x.slots[index]
	pages := make([]uint64, mempage.Words(first%64+n))
	mempage.Bitmap(pages).SetRange(first%64, n)
	start := first &^ 63
	if err := x.LandZero(index, start, first+n-start, pages); err != nil && !errors.Is(err, errNoMissing) {
		return err
	}
	x.waitMu.Lock()
	for !x.over && anyBits(s.absent, first, n) { // somebody else is bringing some
		x.came.Wait()
	}
	x.waitMu.Unlock()
	if x.huge != nil {
		return x.giveUpHuge(index, first, n)
	}
	var wrong error
	ram := x.mem.slots[index].ram
	err := x.mem.eachPopulated(&x.mem.slots[index], first, n, func(at, n uint64) bool {
		at += first
		wrong = guard(func() { clear(ram[at<<mempage.Shift : (at+n)<<mempage.Shift]) })
		return wrong == nil
	})
	return errors.Join(err, wrong)
}

// eachWord calls f with each word that [first, first+n) touches, and the mask of its pages.
func eachWord(first, n uint64, f func(w, mask uint64) bool) {
	for w := first / 64; w*64 < first+n; w++ {
		if !f(w, mempage.WordMask(w, first, first+n)) {
			return
		}
	}
}

func setBits(words []uint64, first, n uint64) {
	eachWord(first, n, func(w, mask uint64) bool { atomic.OrUint64(&words[w], mask); return true })
}

func anyBits(words []uint64, first, n uint64) (any bool) {
	eachWord(first, n, func(w, mask uint64) bool { any = atomic.LoadUint64(&words[w])&mask != 0; return !any })
	return any
}

func allBits(words []uint64, first, n uint64) (all bool) {
	all = true
	eachWord(first, n, func(w, mask uint64) bool { all = atomic.LoadUint64(&words[w])&mask == mask; return all })
	return all
}
