package loader

import (
	"encoding/binary"
	"fmt"
	"testing"
)

// The specification's search, starting at the BIOS data area, finds the CPUs, the IOAPIC
// and the pin of every ISA interrupt.
func TestMPTable(t *testing.T) {
	le := binary.LittleEndian
	for _, cpus := range []int{1, 2, 8, 15, 16, 32, 254} {
		t.Run(fmt.Sprint(cpus), func(t *testing.T) {
			m := newMemory(t, 1<<20)
			if err := WriteMPTable(m, cpus); err != nil {
				t.Fatal(err)
			}
			at := uint64(le.Uint16(read(t, m, 0x40e, 2))) << 4
			if at != ebda || le.Uint16(read(t, m, 0x413, 2)) != 639 {
				t.Errorf("EBDA at %#x, base memory of %d KiB", at, le.Uint16(read(t, m, 0x413, 2)))
			}
			pointer := read(t, m, at, 16)
			if string(pointer[:4]) != "_MP_" || pointer[8] != 1 || pointer[9] != 4 || pointer[11] != 0 || checksum(pointer) != 0 {
				t.Fatalf("floating pointer % x", pointer)
			}
			table := read(t, m, uint64(le.Uint32(pointer[4:])), 44)
			length := uint64(le.Uint16(table[4:]))
			table = read(t, m, uint64(le.Uint32(pointer[4:])), length)
			if string(table[:4]) != "PCMP" || table[6] != 4 || checksum(table) != 0 || le.Uint32(table[36:]) != 0xfee00000 {
				t.Fatalf("table header % x", table[:44])
			}

			ids, boot, pins, local := 0, 0, map[byte]byte{}, map[byte]byte{}
			at, last := uint64(44), byte(0)
			for range le.Uint16(table[34:]) {
				kind := table[at]
				if kind < last {
					t.Fatalf("entry type %d after %d", kind, last)
				}
				last = kind
				e := table[at : at+8]
				switch kind {
				case 0:
					e = table[at : at+20]
					if int(e[1]) != ids || e[2] != 0x14 || e[3]&1 == 0 {
						t.Errorf("CPU %d: % x", ids, e)
					}
					if e[3]&2 != 0 {
						boot++
					}
					ids++
				case 1:
					if e[1] != 0 || string(e[2:]) != "ISA   " {
						t.Errorf("bus % x", e)
					}
				case 2:
					if int(e[1]) != cpus || e[3] != 1 || le.Uint32(e[4:]) != 0xfec00000 {
						t.Errorf("IOAPIC % x", e)
					}
				case 3:
					if e[1] != 0 || int(e[6]) != cpus {
						t.Errorf("interrupt % x", e)
					}
					pins[e[5]] = e[7]
				case 4:
					local[e[7]] = e[1]
				}
				at += uint64(len(e))
			}
			if at != length {
				t.Errorf("entries end at %d, the table at %d", at, length)
			}
			if ids != cpus || boot != 1 {
				t.Errorf("%d CPUs, %d of them the boot CPU", ids, boot)
			}
			for irq := range byte(16) {
				want, found := irq, irq != 2
				if irq == 0 {
					want = 2
				}
				if pin, ok := pins[irq]; ok != found || ok && pin != want {
					t.Errorf("IRQ %d: pin %d, %v", irq, pin, ok)
				}
			}
			if len(local) != 2 || local[0] != 3 || local[1] != 1 {
				t.Errorf("local interrupts %v", local)
			}
			if mpTable+length > HighRAM {
				t.Errorf("the table ends at %#x", mpTable+length)
			}
		})
	}
	for _, cpus := range []int{-1, 0, 255, 1 << 20} {
		if err := WriteMPTable(newMemory(t, 1<<20), cpus); err == nil {
			t.Errorf("%d CPUs were accepted", cpus)
		}
	}
}

// The memory map of a guest with 4 GiB: RAM, the BIOS area, interrupt controllers, and
// RAM above 4 GiB.
func Example_memoryMap() {
	for _, r := range memoryMap(4<<30, nil) {
		fmt.Printf("%#x %#x %d\n", r.GPA, r.Size, r.Type)
	}
	// Output:
	// 0x0 0x9fc00 1
	// 0x9fc00 0x60400 2
	// 0x100000 0xbff00000 1
	// 0xfec00000 0x1400000 2
	// 0x100000000 0x40000000 1
}
