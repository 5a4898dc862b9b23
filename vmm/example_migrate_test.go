package vmm_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"sync"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
)

// firstOutput is the other end of a serial port that has no input. It tells when
// the guest has written something.
type firstOutput struct {
	once  sync.Once
	wrote chan struct{}
}

func (f *firstOutput) Write(p []byte) (int, error) {
	f.once.Do(func() { close(f.wrote) })
	return len(p), nil
}

func (f *firstOutput) ReadInput(context.Context, []byte) (int, error) { return 0, io.EOF }
func (f *firstOutput) Close() error                                   { return nil }

// run runs a VM in the background and delivers how it ended.
func run(vm *vmm.VM) <-chan vmm.Outcome {
	ended := make(chan vmm.Outcome, 1)
	go func() {
		outcome, err := vm.Run(context.Background())
		if err != nil {
			log.Fatal(err)
		}
		ended <- outcome
	}()
	return ended
}

// A VM is made, run, migrated and stopped, all in one process. Between hosts, the
// receiver is in another process and the address another host's.
func ExampleVM_Migrate() {
	ctx := context.Background()
	serial := &firstOutput{wrote: make(chan struct{})}
	source, err := vmm.NewVM(vmm.Config{CPUs: 2, Memory: 64 << 20, Serial: serial}) // the demo guest
	if err != nil {
		log.Fatal(err)
	}
	left := run(source)
	<-serial.wrote

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	destination, err := vmm.NewReceiver(vmm.ReceiveConfig{Listener: listener})
	if err != nil {
		log.Fatal(err)
	}
	arrived := run(destination)

	result, err := source.Migrate(ctx, listener.Addr().String(), migrate.Options{})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("migration:", result.Status)
	fmt.Println("source:", (<-left).Kind)
	fmt.Println("destination:", destination.Info().State)
	if err := destination.Stop(ctx); err != nil {
		log.Fatal(err)
	}
	fmt.Println("destination:", (<-arrived).Kind)
	// Output:
	// migration: completed
	// source: migrated
	// destination: running
	// destination: stopped
}
