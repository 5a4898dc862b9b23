package memory

import (
	"encoding/binary"
	"math/bits"
	"os"
	"strconv"
	"strings"
	"testing"
)

// variant is a backing, and a way of finding holes.
type variant struct {
	name    string
	backing Backing
	entries bool // by reading /proc/self/pagemap, also if the kernel has PAGEMAP_SCAN
}

var variants = []variant{
	{"memfd", Memfd, false},
	{"anonymous", Anonymous, false},
	{"anonymous without PAGEMAP_SCAN", Anonymous, true},
	{"hugetlb", Hugetlb, false},
	{"hugetlb without PAGEMAP_SCAN", Hugetlb, true},
}

// eachVariant runs a test with every backing. make returns memory.
func eachVariant(t *testing.T, size uint64, test func(t *testing.T, v variant, make func(testing.TB) *Memory)) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			if v.backing == Hugetlb {
				needHugePages(t, size/hugePageSize)
			}
			test(t, v, func(t testing.TB) *Memory {
				m := newMemory(t, size, v.backing)
				if v.entries {
					m.pagemap.scan = false
				}
				return m
			})
		})
	}
}

// needHugePages skips the test unless n huge pages are available: in the pool, or by
// overcommit, which root may allow during the test.
func needHugePages(t testing.TB, n uint64) {
	t.Helper()
	const pool = "/sys/kernel/mm/hugepages/hugepages-2048kB/"
	read := func(name string) uint64 {
		text, err := os.ReadFile(pool + name)
		if err != nil {
			t.Skipf("SKIPPED: this kernel has no 2 MiB huge pages: %v", err)
		}
		v, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	if read("free_hugepages")-read("resv_hugepages") >= n {
		return
	}
	const knob = "nr_overcommit_hugepages"
	before := read(knob)
	if err := os.WriteFile(pool+knob, []byte(strconv.FormatUint(before+n, 10)), 0); err != nil {
		t.Skipf("SKIPPED: %d huge pages are needed: sysctl vm.nr_hugepages=%d (%v)", n, n, err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(pool+knob, []byte(strconv.FormatUint(before, 10)), 0); err != nil {
			t.Error(err)
		}
	})
}

// bitSet returns whether bit i is set.
func bitSet(bitmap []uint64, i uint64) bool { return bitmap[i/64]>>(i%64)&1 != 0 }

// dirtyPages fetches the VMM's dirty log of a slot as a list of page numbers.
func dirtyPages(t testing.TB, m *Memory, index int) []uint64 {
	t.Helper()
	var pages []uint64
	err := m.FetchDirty(index, func(w int, word uint64) {
		for ; word != 0; word &= word - 1 {
			pages = append(pages, uint64(w*64+bits.TrailingZeros64(word)))
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return pages
}

// write16, write32 and write64 write a little-endian word, read16 to read64 read one.

func (m *Memory) write16(gpa uint64, v uint16) error {
	return m.WriteAt(binary.LittleEndian.AppendUint16(nil, v), gpa)
}

func (m *Memory) write32(gpa uint64, v uint32) error {
	return m.WriteAt(binary.LittleEndian.AppendUint32(nil, v), gpa)
}

func (m *Memory) write64(gpa, v uint64) error {
	return m.WriteAt(binary.LittleEndian.AppendUint64(nil, v), gpa)
}

func (m *Memory) read16(gpa uint64) (uint16, error) {
	var b [2]byte
	err := m.ReadAt(b[:], gpa)
	return binary.LittleEndian.Uint16(b[:]), err
}

func (m *Memory) read32(gpa uint64) (uint32, error) {
	var b [4]byte
	err := m.ReadAt(b[:], gpa)
	return binary.LittleEndian.Uint32(b[:]), err
}

func (m *Memory) read64(gpa uint64) (uint64, error) {
	var b [8]byte
	err := m.ReadAt(b[:], gpa)
	return binary.LittleEndian.Uint64(b[:]), err
}
