package kvm_test

import (
	"errors"
	"fmt"
	"log"
	"unsafe"

	"github.com/govmm/govmm/kvm"
	"golang.org/x/sys/unix"
)

// Three bytes of code: a guest that writes AL to a port and halts.
func Example() {
	system, err := kvm.Open()
	if err != nil {
		log.Fatal(err)
	}
	defer system.Close()
	vm, err := system.CreateVM()
	if err != nil {
		log.Fatal(err)
	}
	defer vm.Close()

	// One page of memory at address 0, with the code at its start.
	mem, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		log.Fatal(err)
	}
	defer unix.Munmap(mem)
	copy(mem, []byte{
		0xe6, 0x10, // out %al, $0x10
		0xf4, // hlt
	})
	err = vm.SetUserMemoryRegion(kvm.MemorySlot{Size: 4096, HVA: uintptr(unsafe.Pointer(&mem[0]))})
	if err != nil {
		log.Fatal(err)
	}

	vcpu, err := vm.CreateVCPU(0)
	if err != nil {
		log.Fatal(err)
	}
	defer vcpu.Close()
	sregs, err := vcpu.GetSregs()
	if err != nil {
		log.Fatal(err)
	}
	sregs.CS.Base, sregs.CS.Selector = 0, 0
	if err := vcpu.SetSregs(sregs); err != nil {
		log.Fatal(err)
	}
	if err := vcpu.SetRegs(kvm.Regs{RIP: 0, RAX: 42, RFLAGS: 2}); err != nil {
		log.Fatal(err)
	}

	for {
		if err := vcpu.Run(); errors.Is(err, unix.EINTR) {
			continue // a signal; KVM_RUN is called again
		} else if err != nil {
			log.Fatal(err)
		}
		switch reason := vcpu.ExitReason(); reason {
		case kvm.ExitIO:
			io := vcpu.IO()
			fmt.Printf("port %#x: %d\n", io.Port, io.Data[0])
		case kvm.ExitHLT:
			fmt.Println("halted")
			return
		default:
			log.Fatalf("unexpected exit: %v", reason)
		}
	}
	// Output:
	// port 0x10: 42
	// halted
}
