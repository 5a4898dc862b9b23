package memory

import (
	"errors"
	"fmt"
	"os"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// Shareable reports whether another process of this host can map the memory of a backing,
// as [Adopt] does: it is a file.
func Shareable(b Backing) bool { return b == Memfd || b == Hugetlb }

// Shareable reports whether another process of this host can map this memory. Memory of a
// [Shareable] backing can be, unless its content comes from a snapshot's file.
func (m *Memory) Shareable() bool { return m.fd >= 0 }

// File returns a descriptor of the memory's file, which the caller closes, for another
// process that calls [Adopt]; nil if the backing is not [Shareable].
func (m *Memory) File() (*os.File, error) {
	if m.fd < 0 {
		return nil, nil
	}
	if m.missing.Load() != nil {
		return nil, errors.New("the rest of the guest's memory has not come yet")
	}
	fd, err := unix.FcntlInt(uintptr(m.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate the descriptor of guest memory: %w", err)
	}
	return os.NewFile(uintptr(fd), "guest memory"), nil
}

// Adopt returns guest memory in a file that another process has made by [New] and got by
// [Memory.File]. Both have the same pages; nothing is copied, and Close leaves them to the
// other one. Adopt takes the file over, also if it fails. It refuses a file that is not of
// this size and backing, and one whose size can change: access beyond its end is SIGBUS.
func Adopt(size uint64, b Backing, file *os.File) (_ *Memory, err error) {
	m := &Memory{backing: b, low: min(size, HoleStart), unit: slotSize(size), fd: -1}
	m.high = size - m.low
	err = checkFile(size, b, file)
	if err == nil {
		m.fd, err = unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	}
	if err = errors.Join(err, file.Close()); err == nil {
		flags := unix.MAP_SHARED
		if b == Memfd {
			flags |= unix.MAP_NORESERVE
		}
		m.ram, err = mapAligned(m.fd, size, flags)
	}
	if err == nil {
		err = m.prepare()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("take over guest memory of %d MiB, backing %s: %w", size>>20, b, err), m.Close())
	}
	m.cut(0, 0, m.low)
	m.lows = uint64(len(m.slots))
	m.cut(HoleEnd, m.low, m.high)
	return m, nil
}

// checkFile refuses what is no memory of that size and backing.
func checkFile(size uint64, b Backing, file *os.File) error {
	var st unix.Stat_t
	var fs unix.Statfs_t
	fd := int(file.Fd())
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("fstat: %w", err)
	}
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return fmt.Errorf("fstatfs: %w", err)
	}
	kind := int64(unix.TMPFS_MAGIC)
	if b == Hugetlb {
		kind = unix.HUGETLBFS_MAGIC
	}
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	const fixed = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW
	switch {
	case !Shareable(b):
		return errors.New("it is no file that two processes can map")
	case st.Mode&unix.S_IFMT != unix.S_IFREG || fs.Type != kind:
		return fmt.Errorf("expected a file of file system %#x, found mode %#o on %#x", kind, st.Mode, fs.Type)
	case uint64(st.Size) != size:
		return fmt.Errorf("expected a file of %d bytes, found %d", size, st.Size)
	case err != nil || seals&fixed != fixed:
		return fmt.Errorf("expected a file whose size is sealed, found seals %#x", seals)
	case b == Hugetlb && (size%hugePageSize != 0 || fs.Bsize != hugePageSize):
		return fmt.Errorf("expected pages of %d bytes, found %d", hugePageSize, fs.Bsize)
	}
	return nil
}

// Inherited tells a memory of [Hugetlb] that was adopted which of its huge pages, counted
// from the start of the memory, the process before had populated, as [Memory.Populations]
// returns them: the page table of this process, by which holes are found, does not know
// those that it has not accessed yet. It is called before the guest runs here. Such pages
// stay populated for as long as there is the memory.
func (m *Memory) Inherited(populated mempage.Bitmap) error {
	if m.backing != Hugetlb {
		return nil
	}
	if want := mempage.Words(m.hugePages()); uint64(len(populated)) != want {
		return fmt.Errorf("populated huge pages: expected %d words, found %d", want, len(populated))
	}
	m.inherited = populated
	return nil
}

// Populations returns which huge pages of a memory of [Hugetlb] are populated; nil for
// other backings, whose files know.
func (m *Memory) Populations() (mempage.Bitmap, error) {
	if m.backing != Hugetlb {
		return nil, nil
	}
	all := make(mempage.Bitmap, mempage.Words(m.hugePages()))
	for i := range m.slots {
		s := &m.slots[i]
		err := m.eachPopulated(s, 0, s.pages(), func(at, n uint64) bool {
			first := (s.off + at<<mempage.Shift) / hugePageSize
			last := (s.off + (at+n)<<mempage.Shift - 1) / hugePageSize
			all.SetRange(first, last-first+1)
			return true
		})
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

func (m *Memory) hugePages() uint64 { return uint64(len(m.ram)) / hugePageSize }

// inheritedPopulated is eachPopulated for memory of huge pages some of which are known
// from the process before.
func (m *Memory) inheritedPopulated(s *slot, first, n uint64, found func(at, n uint64) bool) error {
	start, end := s.off+first<<mempage.Shift, s.off+(first+n)<<mempage.Shift // in m.ram
	low, high := start/hugePageSize, (end+hugePageSize-1)/hugePageSize
	there := make(mempage.Bitmap, mempage.Words(high-low))
	for i := low; i < high; i++ {
		if m.inherited.Get(i) {
			there.SetRange(i-low, 1)
		}
	}
	err := m.pagemap.populated(s.HVA+uintptr(first<<mempage.Shift), n, func(at, count uint64) bool {
		from, to := start+at<<mempage.Shift, start+(at+count)<<mempage.Shift-1
		there.SetRange(from/hugePageSize-low, to/hugePageSize-from/hugePageSize+1)
		return true
	})
	if err != nil {
		return err
	}
	for i := low; i < high; {
		if !there.Get(i - low) {
			i++
			continue
		}
		from := i
		for i < high && there.Get(i-low) {
			i++
		}
		a, b := max(from*hugePageSize, start), min(i*hugePageSize, end)
		if !found((a-start)>>mempage.Shift, (b-a)>>mempage.Shift) {
			return nil
		}
	}
	return nil
}
