package serial_test

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/govmm/govmm/vmm/serial"
)

func Example() {
	setIRQ4 := func(level bool) {} // KVM_IRQ_LINE
	u := serial.New(setIRQ4, os.Stdout)
	for _, b := range []byte("hello from the guest\n") {
		for u.ReadPort(5)&0x20 == 0 { // LSR.THRE: the guest waits, the vCPU does not
		}
		u.WritePort(0, b)
	}
	if err := u.Drain(context.Background()); err != nil {
		log.Fatal(err)
	}
	u.Feed([]byte("typed"))
	fmt.Printf("%c\n", u.ReadPort(0))
	if err := u.Close(); err != nil {
		log.Fatal(err)
	}
	// Output:
	// hello from the guest
	// t
}
