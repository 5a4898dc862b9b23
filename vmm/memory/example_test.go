package memory_test

import (
	"fmt"
	"log"

	"github.com/govmm/govmm/vmm/memory"
)

func Example() {
	m, err := memory.New(4<<30, memory.DefaultBacking)
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = m.Close() }()
	for _, s := range m.Slots() {
		fmt.Printf("slot at gpa %#x, %d MiB\n", s.GPA, s.Size>>20)
	}
	if err := m.WriteAt([]byte{42, 0, 0, 0}, 4<<30); err != nil {
		log.Fatal(err)
	}
	fmt.Println(m.WriteAt([]byte{42, 0, 0, 0}, 3<<30))

	// The VMM's writes, one bit for each page: the first page of the last slot.
	err = m.FetchDirty(3, func(w int, word uint64) { fmt.Printf("word %d: %#x\n", w, word) })
	if err != nil {
		log.Fatal(err)
	}
	// Output:
	// slot at gpa 0x0, 1024 MiB
	// slot at gpa 0x40000000, 1024 MiB
	// slot at gpa 0x80000000, 1024 MiB
	// slot at gpa 0x100000000, 1024 MiB
	// guest memory at gpa 0xc0000000, 4 bytes: not guest RAM
	// word 0: 0x1
}
