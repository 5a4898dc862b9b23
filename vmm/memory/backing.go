package memory

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// Backing is what guest memory is made of on the host.
type Backing string

// The backings.
const (
	// Memfd is a memory file of 4 KiB pages (of huge pages where
	// /sys/kernel/mm/transparent_hugepage/shmem_enabled allows it), which can
	// be handed to another process.
	Memfd Backing = "memfd"
	// Anonymous is private memory with transparent huge pages.
	Anonymous Backing = "anonymous"
	// Hugetlb is a memory file of 2 MiB pages out of the pool that the
	// administrator has reserved (vm.nr_hugepages).
	Hugetlb Backing = "hugetlb"
)

// DefaultBacking is the fastest to populate of those that need no preparation
// of the host; docs/memory.md has the measurements.
const DefaultBacking = Anonymous

// ParseBacking reads a backing's name.
func ParseBacking(s string) (Backing, error) {
	switch b := Backing(s); b {
	case Memfd, Anonymous, Hugetlb:
		return b, nil
	}
	return "", fmt.Errorf("memory backing %q: use %s, %s or %s", s, Anonymous, Memfd, Hugetlb)
}

// open maps size bytes of m.backing at m.ram and opens what finds its holes.
func (m *Memory) open(size uint64) error {
	if pageSizeOfHost != mempage.Size {
		return fmt.Errorf("guest memory: the host's pages have %d bytes, govmm knows %d", pageSizeOfHost, mempage.Size)
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
			// Without MAP_NORESERVE: the pool's pages are set aside now, so
			// that an empty pool is an error here and not SIGBUS later.
			m.ram, err = mapAligned(m.fd, size, unix.MAP_SHARED)
		}
		if errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) {
			err = hugetlbError(size, err)
		}
	}
	if err != nil {
		return fmt.Errorf("guest memory of %d MiB, backing %s: %w", size>>20, m.backing, err)
	}
	// A child (there should be none but by exec) must not share or copy it.
	if err := unix.Madvise(m.ram, unix.MADV_DONTFORK); err != nil {
		return fmt.Errorf("madvise guest memory, MADV_DONTFORK: %w", err)
	}
	if m.backing != Hugetlb {
		// EINVAL: a kernel without transparent huge pages. Pages are 4 KiB then.
		if err := unix.Madvise(m.ram, unix.MADV_HUGEPAGE); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("madvise guest memory, MADV_HUGEPAGE: %w", err)
		}
	}
	if m.backing != Memfd {
		if m.pagemap, err = openPagemap(); err != nil {
			return err
		}
	}
	return nil
}

// memfd makes a memory file of size bytes whose size cannot change any more: a
// file that is cut short under a mapping is SIGBUS.
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

// mapAligned maps size bytes at a multiple of 2 MiB, without which neither the
// kernel nor KVM can use huge pages: guest and host address of a huge page must
// agree in their low 21 bits, and slots start at multiples of 1 GiB.
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
		return nil, fmt.Errorf("munmap the reserve around guest memory: %w", err)
	}
	return unsafe.Slice((*byte)(ram), size), nil
}

// hugetlbError says what the pool of huge pages lacks and what to do about it.
func hugetlbError(size uint64, cause error) error {
	const pool = "/sys/kernel/mm/hugepages/hugepages-2048kB/"
	need := size / hugePageSize
	read := func(name string) uint64 {
		text, err := os.ReadFile(pool + name)
		if err != nil {
			return 0
		}
		n, _ := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
		return n
	}
	if _, err := os.Stat(pool); err != nil {
		return fmt.Errorf("this kernel has no 2 MiB huge pages (no %s); use --memory-backing %s: %w", pool, DefaultBacking, cause)
	}
	total, free, taken := read("nr_hugepages"), read("free_hugepages"), read("resv_hugepages")
	free -= min(free, taken)
	return fmt.Errorf("needs %d huge pages of 2 MiB, the host has %d free of %d; reserve more with `sysctl vm.nr_hugepages=%d`, or use --memory-backing %s: %w",
		need, free, total, total+need-min(need, free), DefaultBacking, cause)
}
