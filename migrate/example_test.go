package migrate_test

import (
	"context"
	"fmt"
	"log"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/simtest"
)

// A simulated guest of two vCPUs moves while it writes memory. Both sides are in
// this process, and are connected in memory.
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

	// The destination.
	listener := simtest.Listen()
	receiver := migrate.NewReceiver(&simtest.Builder{World: world}, nil)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error)
	go func() { served <- receiver.Serve(ctx, listener) }()

	// The source.
	m := migrate.New(guest, "the other side", migrate.Options{Dial: listener.Dial})
	result, err := m.Run(ctx)
	fmt.Println(result.Status, err)
	<-receiver.Arrived()
	fmt.Println("runs here:", guest.Running(), "there:", world.Holder().Running())
	fmt.Println("lost pages, or two that ran:", world.Err())
	cancel()
	<-served
	// Output:
	// completed <nil>
	// runs here: false there: true
	// lost pages, or two that ran: <nil>
}
