package simtest_test

import (
	"context"
	"fmt"
	"log"
	"net"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/simtest"
)

// A guest of two vCPUs moves over TCP while it writes memory.
func Example() {
	world := simtest.NewWorld()
	defer world.Close()
	guest, err := simtest.NewMachine(world, simtest.Config{
		Layout: simtest.Layout{Slots: []migrate.Slot{{Pages: 512}}, ManualProtect: true},
		CPUs:   2, Dirty: 64, Fill: 512,
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := guest.Resume(); err != nil {
		log.Fatal(err)
	}

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	receiver := migrate.NewReceiver(&simtest.Builder{World: world}, nil)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error)
	go func() { served <- receiver.Serve(ctx, listener) }()

	_, err = migrate.New(guest, listener.Addr().String(), migrate.DefaultOptions()).Run(ctx)
	fmt.Println("error:", err)
	<-receiver.Arrived()
	fmt.Println("runs here:", guest.Running(), "there:", world.Holder().Running())
	fmt.Println("lost pages, or two that ran:", world.Err())
	cancel()
	<-served
	// Output:
	// error: <nil>
	// runs here: false there: true
	// lost pages, or two that ran: <nil>
}
