package memory

import (
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// mapped is what memory has beside its mapping if that is a private one of a file: pages
// are read from the file when they are touched, and copied when they are written. The file
// is not changed.
//
// A page that is given back to the host would read as the file does. So where the file has
// data, anonymous memory is mapped over it; such pages are in over. There are bounds to how
// many mappings a process may have: beyond maxPieces of them pages are cleared instead.
type mapped struct {
	fd int // the file

	overMu sync.Mutex // guards over and pieces; held while memory is mapped
	over   mempage.Bitmap
	pieces int

	prefetch sync.WaitGroup
	ending   chan struct{}
}

// maxPieces is how often memory is mapped over the file; each makes two mappings more, of
// the 65,530 that a process may have (vm.max_map_count).
const maxPieces = 1 << 14

// mappedFile is the backing of memory from a file, which nobody asks for by name.
const mappedFile Backing = "file"

// NewMapped returns guest memory of size bytes whose content is that of a file, which has
// the slots one after another, as [Layout] says. The file must keep its size and content
// for as long as the memory is used. The descriptor is duplicated.
func NewMapped(size uint64, file int) (*Memory, error) {
	var st unix.Stat_t
	if err := unix.Fstat(file, &st); err != nil {
		return nil, fmt.Errorf("guest memory from a file: stat: %w", err)
	}
	if size < MinSize || size > MaxSize || size%mempage.Size != 0 || uint64(st.Size) != size {
		return nil, fmt.Errorf("guest memory of %d bytes from a file of %d: must be equal, and a multiple of %d between 1 MiB and 16 TiB", size, st.Size, mempage.Size)
	}
	return made(size, mappedFile, func(m *Memory) error {
		if pageSizeOfHost != mempage.Size {
			return fmt.Errorf("guest memory: expected a host with pages of %d bytes, found %d", mempage.Size, pageSizeOfHost)
		}
		own, err := unix.FcntlInt(uintptr(file), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("guest memory from a file: duplicate its descriptor: %w", err)
		}
		m.mapped = &mapped{fd: own, over: mempage.NewBitmap(size >> mempage.Shift), ending: make(chan struct{})}
		if m.ram, err = mapAligned(own, size, unix.MAP_PRIVATE|unix.MAP_NORESERVE); err != nil {
			return fmt.Errorf("guest memory of %d MiB from a file: %w", size>>20, err)
		}
		if err := advise(m.ram, false); err != nil {
			return err
		}
		if m.pagemap, err = newPagemap(); err != nil {
			return err
		}
		m.pagemap.private = true
		return nil
	})
}

// window is how many pages are looked at at once.
const window = 32 << 10

// eachMapped is eachPopulated: what the file has and is not mapped over, and what was
// written.
func (m *Memory) eachMapped(s *slot, first, n uint64, found func(at, n uint64) bool) error {
	bits := mempage.NewBitmap(min(n, window))
	for done := uint64(0); done < n; done += window {
		count := min(window, n-done)
		b := bits[:mempage.Words(count)]
		if err := m.mappedBits(s, first+done, count, b); err != nil {
			return err
		}
		for at := b.NextSet(0, count); at < count; {
			end := b.NextClear(at, count)
			if !found(done+at, end-at) {
				return nil
			}
			at = b.NextSet(end, count)
		}
	}
	return nil
}

// mappedBits sets the bits of the pages that may hold data.
func (m *Memory) mappedBits(s *slot, first, n uint64, b mempage.Bitmap) error {
	clear(b)
	start := int64(s.off + first<<mempage.Shift)
	err := Extents(m.mapped.fd, start, start+int64(n<<mempage.Shift), func(from, to int64) error {
		lo, hi := uint64(from-start)>>mempage.Shift, uint64(to-start+mempage.Size-1)>>mempage.Shift
		b.SetRange(lo, hi-lo)
		return nil
	})
	if err != nil {
		return fmt.Errorf("look for holes in the file of guest memory: %w", err)
	}
	m.mapped.withoutOver(uint64(start)>>mempage.Shift, n, b)
	return m.pagemap.populated(s.HVA+uintptr(first<<mempage.Shift), n, func(at, n uint64) bool {
		b.SetRange(at, n)
		return true
	})
}

// withoutOver clears the bits of pages that are mapped over. first is a page of the file.
func (p *mapped) withoutOver(first, n uint64, b mempage.Bitmap) {
	p.overMu.Lock()
	defer p.overMu.Unlock()
	for at := p.over.NextSet(first, first+n); at < first+n; {
		end := p.over.NextClear(at, first+n)
		b.ClearRange(at-first, end-at)
		at = p.over.NextSet(end, first+n)
	}
}

// nextMapped is NextPopulated.
func (m *Memory) nextMapped(s *slot, first, n uint64) (uint64, error) {
	written, err := m.pagemap.next(s.HVA+uintptr(first<<mempage.Shift), n)
	if err != nil {
		return first, err
	}
	end := int64(s.off + (first+written)<<mempage.Shift)
	for at := int64(s.off + first<<mempage.Shift); at < end; {
		data, err := unix.Seek(m.mapped.fd, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || err == nil && data >= end {
			break // no more data
		}
		if err != nil {
			return first, fmt.Errorf("SEEK_DATA in the file of guest memory at %#x: %w", at, err)
		}
		page := uint64(data) >> mempage.Shift
		m.mapped.overMu.Lock()
		next := m.mapped.over.NextClear(page, uint64(end)>>mempage.Shift)
		m.mapped.overMu.Unlock()
		if next == page {
			return page - s.off>>mempage.Shift, nil
		}
		at = int64(next << mempage.Shift)
	}
	return first + written, nil
}

// zeroMapped is Zero.
func (m *Memory) zeroMapped(s *slot, first, n uint64) error {
	p := m.mapped
	p.overMu.Lock()
	defer p.overMu.Unlock()
	start := s.off + first<<mempage.Shift
	for at, end := start>>mempage.Shift, start>>mempage.Shift+n; at < end; {
		next := p.over.NextSet(at, end)
		if next == at {
			next = p.over.NextClear(at, end)
			if err := m.drop(at, next); err != nil {
				return err
			}
		} else if err := m.zeroFile(at, next); err != nil {
			return err
		}
		at = next
	}
	return nil
}

// zeroFile makes pages [from, to) of the file read as zero here. overMu is held.
func (m *Memory) zeroFile(from, to uint64) error {
	at := from
	err := Extents(m.mapped.fd, int64(from<<mempage.Shift), int64(to<<mempage.Shift), func(start, end int64) error {
		lo, hi := max(at, uint64(start)>>mempage.Shift), uint64(end+mempage.Size-1)>>mempage.Shift
		if err := m.drop(at, lo); err != nil {
			return err
		}
		at = max(at, hi)
		if lo >= hi {
			return nil
		}
		return m.replace(lo, hi)
	})
	if err != nil {
		return err
	}
	return m.drop(at, to)
}

// drop frees what was written to pages [from, to): they read as the file's hole, or as the
// anonymous memory over it, does.
func (m *Memory) drop(from, to uint64) error {
	if from >= to {
		return nil
	}
	ram := m.ram[from<<mempage.Shift : to<<mempage.Shift]
	if err := retryEINTR(func() error { return unix.Madvise(ram, unix.MADV_DONTNEED) }); err != nil {
		return fmt.Errorf("MADV_DONTNEED of %d pages: %w", to-from, err)
	}
	return nil
}

// replace maps anonymous memory over pages [from, to), or clears them. overMu is held.
func (m *Memory) replace(from, to uint64) error {
	p, ram := m.mapped, m.ram[from<<mempage.Shift:to<<mempage.Shift]
	if p.pieces < maxPieces {
		_, err := unix.MmapPtr(-1, 0, unsafe.Pointer(unsafe.SliceData(ram)), uintptr(len(ram)), unix.PROT_READ|unix.PROT_WRITE,
			unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE|unix.MAP_FIXED)
		if err == nil {
			p.pieces++
			p.over.SetRange(from, to-from)
			return advise(ram, true)
		}
		if !errors.Is(err, unix.ENOMEM) {
			return fmt.Errorf("map anonymous memory over %d pages of the file: %w", to-from, err)
		}
	}
	return guard(func() { clear(ram) })
}

// Prefetch reads ranges of a memory from a file, in pages of the file and in order, in the
// background: as if they were written, which they are about to be. It ends with the memory.
func (m *Memory) Prefetch(count int, ranges func(i int) (first, n uint64)) {
	p := m.mapped
	if p == nil || count == 0 {
		return
	}
	p.prefetch.Go(func() {
		const step = hugePageSize >> mempage.Shift
		for i := range count {
			first, n := ranges(i)
			_ = unix.Fadvise(p.fd, int64(first<<mempage.Shift), int64(n<<mempage.Shift), unix.FADV_WILLNEED)
		}
		for i := range count {
			first, n := ranges(i)
			for end := first + n; first < end; first += step {
				select {
				case <-p.ending:
					return
				default:
				}
				ram := m.ram[first<<mempage.Shift : min(first+step, end)<<mempage.Shift]
				if unix.Madvise(ram, unix.MADV_POPULATE_WRITE) != nil { // the guest does it, then
					return
				}
			}
		}
	})
}

// end ends what is done in the background, and closes the file. The mapping stays.
func (p *mapped) end() {
	if p == nil || p.fd < 0 {
		return
	}
	close(p.ending)
	p.prefetch.Wait()
	_ = unix.Close(p.fd)
	p.fd = -1
}
