package vmm_test

import (
	"context"
	"fmt"
	"log"

	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/loader/elftest"
	"github.com/govmm/govmm/vmm/serial"
)

// A guest of a few instructions says hello on its serial port and powers off.
func Example() {
	kernel := elftest.Build(elftest.Kernel{Code: []byte{
		0x66, 0xba, 0xf8, 0x03, // mov $0x3f8,%dx: COM1
		0xb0, 'h', 0xee, // mov $'h',%al; out %al,(%dx)
		0xb0, 'e', 0xee,
		0xb0, 'l', 0xee,
		0xee,
		0xb0, 'o', 0xee,
		0xb0, '\n', 0xee,
		0x66, 0xba, 0x04, 0x06, // mov $0x604,%dx: power
		0x66, 0xb8, 0x00, 0x20, // mov $0x2000,%ax: SLP_EN
		0x66, 0xef, // out %ax,(%dx)
	}})
	backend, err := serial.OpenBackend("stdio", serial.Options{})
	if err != nil {
		log.Fatal(err)
	}
	vm, err := vmm.NewVM(vmm.Config{Memory: 16 << 20, Kernel: kernel, Serial: backend})
	if err != nil {
		log.Fatal(err)
	}
	outcome, err := vm.Run(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(outcome.Text)
	// Output:
	// hello
	// the guest powered off
}
