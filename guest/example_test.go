package guest_test

import (
	"bytes"
	"debug/elf"
	"fmt"
	"log"

	"github.com/govmm/govmm/guest"
)

// The guest is an ordinary ELF to any loader that knows the PVH note.
func Example() {
	f, err := elf.NewFile(bytes.NewReader(guest.ELF))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(f.Class, f.Machine, f.Section(".note.pvh").Type)
	fmt.Println(guest.DefaultCmdline)
	// Output:
	// ELFCLASS64 EM_X86_64 SHT_NOTE
	// fill=128M dirty=16M rate=1000 verify=5 tick=1
}
