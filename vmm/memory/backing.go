package memory

import (
	"errors"
	"fmt"
	"unsafe"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// Backing is the kind of host memory that guest memory uses.
type Backing string

// The backings.
const (
	// Memfd is a memfd of 4 KiB pages, or of huge pages if
	// /sys/kernel/mm/transparent_hugepage/shmem_enabled allows it.
	Memfd Backing = "memfd"
	// Anonymous is private memory with transparent huge pages.
	Anonymous Backing = "anonymous"
	// Hugetlb is a memfd of 2 MiB pages from the pool that the administrator has
	// reserved (vm.nr_hugepages).
	Hugetlb Backing = "hugetlb"
)

// DefaultBacking is the backing that populates fastest without preparation of the
// host; see docs/memory.md.
const DefaultBacking = Anonymous

// ParseBacking returns the backing with the name s.
func ParseBacking(s string) (Backing, error) {
	switch b := Backing(s); b {
	case Memfd, Anonymous, Hugetlb:
		return b, nil
	}
	return "", fmt.Errorf("memory backing must be %[2]s, %[3]s or %[4]s, got %[1]q", s, Anonymous, Memfd, Hugetlb)
}

// open maps size bytes of m.backing at m.ram, and prepares the pagemap if holes are
// found with it.
func (m *Memory) open(size uint64) error {
	if pageSizeOfHost != mempage.Size {
		return fmt.Errorf("guest memory: expected a host with pages of %d bytes, found %d", mempage.Size, pageSizeOfHost)
	}
	var err error
	switch m.backing {
	case Anonymous:
		m.ram, err = mapAligned(-1, size, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	case Memfd:
		if m.fd, err = memfd(size, 0); err == nil {
			m.ram, err = mapAligned(m.fd, size, unix.MAP_SHARED|unix.MAP_NORESERVE)
		}
	case Hugetlb:
		if m.fd, err = memfd(size, unix.MFD_HUGETLB|unix.MFD_HUGE_2MB); err == nil {
			// Without MAP_NORESERVE the kernel reserves the pool's pages now: an
			// empty pool is an error here instead of SIGBUS later.
			m.ram, err = mapAligned(m.fd, size, unix.MAP_SHARED)
		}
		if errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) {
			err = hugetlbError(size, err)
		}
	}
	if err != nil {
		return fmt.Errorf("guest memory of %d MiB, backing %s: %w", size>>20, m.backing, err)
	}
	return m.prepare()
}

// prepare is what follows once m.ram is mapped.
func (m *Memory) prepare() (err error) {
	if err := advise(m.ram, m.backing != Hugetlb); err != nil {
		return err
	}
	if m.backing != Memfd {
		if m.pagemap, err = newPagemap(); err != nil {
			return err
		}
	}
	return nil
}

// advise tells the kernel what guest memory is.
func advise(ram []byte, hugePages bool) error {
	// A child process must not share or copy guest memory.
	if err := unix.Madvise(ram, unix.MADV_DONTFORK); err != nil {
		return fmt.Errorf("madvise guest memory, MADV_DONTFORK: %w", err)
	}
	// Nor is it for the file of a core dump: it is large, and it is the guest's secret.
	if err := unix.Madvise(ram, unix.MADV_DONTDUMP); err != nil {
		return fmt.Errorf("madvise guest memory, MADV_DONTDUMP: %w", err)
	}
	if hugePages {
		// EINVAL: the kernel has no transparent huge pages.
		if err := unix.Madvise(ram, unix.MADV_HUGEPAGE); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("madvise guest memory, MADV_HUGEPAGE: %w", err)
		}
	}
	return nil
}

// memfd returns a memfd of size bytes, sealed so that its size cannot change: access
// to a mapping beyond the end of a file is SIGBUS.
func memfd(size uint64, flags int) (int, error) {
	fd, err := unix.MemfdCreate("govmm-ram", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|flags)
	if err != nil {
		return -1, fmt.Errorf("memfd_create: %w", err)
	}
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("ftruncate memfd: %w", err)
	}
	seals := unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("seal memfd: %w", err)
	}
	return fd, nil
}

// mapAligned maps size bytes at a multiple of 2 MiB. The kernel and KVM require this
// for huge pages: the guest and host addresses of a huge page must have the same low
// 21 bits, and slots start at multiples of 1 GiB.
func mapAligned(fd int, size uint64, flags int) ([]byte, error) {
	reserved := uintptr(size) + hugePageSize
	base, err := unix.MmapPtr(-1, 0, nil, reserved, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("mmap, to reserve %d bytes of address space: %w", reserved, err)
	}
	head := -uintptr(base) & (hugePageSize - 1)
	start := unsafe.Add(base, head)
	ram, err := unix.MmapPtr(fd, 0, start, uintptr(size), unix.PROT_READ|unix.PROT_WRITE, flags|unix.MAP_FIXED)
	if err != nil {
		_ = unix.MunmapPtr(base, reserved)
		return nil, fmt.Errorf("mmap: %w", err)
	}
	if head > 0 {
		err = unix.MunmapPtr(base, head)
	}
	if tail := hugePageSize - head; err == nil && tail > 0 {
		end := (size + mempage.Size - 1) &^ (mempage.Size - 1)
		err = unix.MunmapPtr(unsafe.Add(start, end), tail)
	}
	if err != nil {
		_ = unix.MunmapPtr(base, reserved)
		return nil, fmt.Errorf("munmap address space around guest memory: %w", err)
	}
	return unsafe.Slice((*byte)(ram), size), nil
}

// hugetlbError describes the state of the pool of huge pages and what to do.
func hugetlbError(size uint64, cause error) error {
	r, err := thisHost.pool(0)
	if err != nil {
		return fmt.Errorf("%w; use backing %s: %w", err, DefaultBacking, cause)
	}
	return fmt.Errorf("%s: %w", r.tooLittle(size, Hugetlb), cause)
}
