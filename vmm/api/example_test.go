package api_test

import (
	"context"
	"log"

	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
)

// A program runs the demo guest. While it does, govmm ps lists the VM as "mine",
// and all other commands and clients reach it.
func ExampleNewServer() {
	claim, err := api.ClaimName(api.Directory(), "mine")
	if err != nil {
		log.Fatal(err)
	}
	defer claim.Release()
	vm, err := vmm.NewVM(vmm.Config{Name: claim.Name()})
	if err != nil {
		log.Fatal(err)
	}
	ln, err := claim.Listen()
	if err != nil {
		log.Fatal(err)
	}
	server := api.NewServer(vm, claim.Socket())
	go func() { _ = server.Serve(ln) }()
	outcome, err := vm.Run(context.Background())
	server.Shutdown() // sends the last answers
	if err != nil {
		log.Print(err)
	}
	log.Print(outcome.Text)
}
