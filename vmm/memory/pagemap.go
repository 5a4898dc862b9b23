package memory

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// pagemap finds the populated pages of this process's memory without access to
// them: with the ioctl PAGEMAP_SCAN (Linux 6.7), otherwise by reading
// /proc/self/pagemap, 8 bytes for each page.
type pagemap struct {
	fd   int
	scan bool // the kernel has PAGEMAP_SCAN
	// private leaves out pages of files: of a private mapping of a file, only what was
	// written is found.
	private bool
}

// From include/uapi/linux/fs.h.
const (
	ioctlPagemapScan = 0xc0606610 // _IOWR('f', 16, struct pm_scan_arg)

	pageIsFile    = 1 << 2
	pageIsPresent = 1 << 3
	pageIsSwapped = 1 << 4
	pageIsPFNZero = 1 << 5
)

// Entries of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
const (
	entryPresent = 1 << 63
	entrySwapped = 1 << 62
	entryFile    = 1 << 61 // of a file, or shared
)

// pmScanArg is struct pm_scan_arg.
type pmScanArg struct {
	size             uint64
	flags            uint64
	start            uint64
	end              uint64
	walkEnd          uint64 // out: where the walk ended
	vec              uint64
	vecLen           uint64
	maxPages         uint64
	categoryInverted uint64
	categoryMask     uint64
	categoryAnyof    uint64
	returnMask       uint64
}

// pageRegion is struct page_region: a range of pages of the same categories.
type pageRegion struct {
	start uint64
	end   uint64
	_     uint64 // the categories in returnMask
}

// scratch has the buffers of one query. They are reused, because a migration makes
// many queries.
type scratch struct {
	arg     pmScanArg
	regions [512]pageRegion
	entries [32 << 10]byte // of 4096 pages
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// pagemapFile opens this process's pagemap. It stays open to the end of the process, so
// that memory that is made later, in a sandbox, need not open it.
var pagemapFile = sync.OnceValues(func() (int, error) {
	fd, err := unix.Open("/proc/self/pagemap", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open /proc/self/pagemap, to find holes in guest memory: %w", err)
	}
	return fd, nil
})

// newPagemap detects PAGEMAP_SCAN.
func newPagemap() (*pagemap, error) {
	fd, err := pagemapFile()
	if err != nil {
		return nil, err
	}
	p := &pagemap{fd: fd}
	// A scan of an empty range succeeds if the kernel has the ioctl.
	s := scratches.Get().(*scratch)
	_, err = p.scanOnce(s, 0, 0, 0)
	scratches.Put(s)
	p.scan = err == nil
	return p, nil
}

// populated calls found for each range of populated pages in the n pages at host
// virtual address hva, in order, until it returns false. found's page numbers count from
// hva.
func (p *pagemap) populated(hva uintptr, n uint64, found func(first, n uint64) bool) error {
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	if p.scan {
		return p.byScan(s, uint64(hva), n, found)
	}
	return p.byEntries(s, uint64(hva), n, found)
}

// next returns how far the first populated page is from hva, or n if none of the n
// pages is populated.
func (p *pagemap) next(hva uintptr, n uint64) (uint64, error) {
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	if p.scan {
		start := uint64(hva)
		count, err := p.scanOnce(s, start, start+n<<mempage.Shift, 1)
		if err != nil || count == 0 {
			return n, err
		}
		return (s.regions[0].start - start) >> mempage.Shift, nil
	}
	// In steps that grow: where the first page is near, little is read.
	for done, step := uint64(0), uint64(64); done < n; done, step = done+step, 2*step {
		at := n
		err := p.byEntries(s, uint64(hva)+done<<mempage.Shift, min(step, n-done), func(first, _ uint64) bool {
			at = done + first
			return false
		})
		if err != nil || at < n {
			return at, err
		}
	}
	return n, nil
}

// byScan finds ranges with PAGEMAP_SCAN. The kernel holds mmap_lock for reading
// during the scan, so khugepaged cannot move pages.
func (p *pagemap) byScan(s *scratch, start, n uint64, found func(first, n uint64) bool) error {
	end := start + n<<mempage.Shift
	for at := start; at < end; {
		count, err := p.scanOnce(s, at, end, 0)
		if err != nil {
			return fmt.Errorf("PAGEMAP_SCAN of guest memory at [%#x,%#x): %w", at, end, err)
		}
		for _, r := range s.regions[:count] {
			if !found((r.start-start)>>mempage.Shift, (r.end-r.start)>>mempage.Shift) {
				return nil
			}
		}
		if s.arg.walkEnd <= at {
			return fmt.Errorf("PAGEMAP_SCAN of guest memory at [%#x,%#x): no progress", at, end)
		}
		at = s.arg.walkEnd
	}
	return nil
}

// scanOnce finds the populated regions in [start, end): present or swapped out (a
// migration entry counts as swapped), without the shared zero page, which the kernel
// maps for a read of a page that was never written. It ends after most pages, if most
// is not 0.
func (p *pagemap) scanOnce(s *scratch, start, end, most uint64) (int, error) {
	s.arg = pmScanArg{
		size:             uint64(unsafe.Sizeof(s.arg)),
		start:            start,
		end:              end,
		vec:              uint64(uintptr(unsafe.Pointer(&s.regions))),
		vecLen:           uint64(len(s.regions)),
		maxPages:         most,
		categoryInverted: pageIsPFNZero,
		categoryMask:     pageIsPFNZero,
		categoryAnyof:    pageIsPresent | pageIsSwapped,
		returnMask:       pageIsPresent,
	}
	if p.private {
		s.arg.categoryInverted |= pageIsFile
		s.arg.categoryMask |= pageIsFile
	}
	for {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(p.fd), ioctlPagemapScan, uintptr(unsafe.Pointer(&s.arg)))
		switch {
		case errno == 0:
			return int(min(uint64(n), uint64(len(s.regions)))), nil
		case errno != unix.EINTR:
			return 0, errno
		}
	}
}

// byEntries finds ranges by reading the pagemap. It cannot distinguish the shared
// zero page from others, because frame numbers are hidden without CAP_SYS_ADMIN: a
// page that was read but never written counts as populated.
func (p *pagemap) byEntries(s *scratch, start, n uint64, found func(first, n uint64) bool) error {
	const entrySize = 8
	for done := uint64(0); done < n; {
		buf := s.entries[:min(uint64(len(s.entries)), (n-done)*entrySize)]
		got, err := unix.Pread(p.fd, buf, int64((start>>mempage.Shift+done)*entrySize))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read /proc/self/pagemap: %w", err)
		}
		if got < entrySize {
			return fmt.Errorf("read /proc/self/pagemap of guest memory at %#x: unexpected end of file", start+done<<mempage.Shift)
		}
		pages := uint64(got / entrySize)
		for i := uint64(0); i < pages; i++ {
			entry := binary.NativeEndian.Uint64(buf[i*entrySize:])
			if p.private && entry&entryFile != 0 {
				continue
			}
			if entry&(entryPresent|entrySwapped) != 0 && !found(done+i, 1) {
				return nil
			}
		}
		done += pages
	}
	return nil
}
