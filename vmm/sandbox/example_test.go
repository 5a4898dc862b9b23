package sandbox_test

import (
	"fmt"
	"log"

	"github.com/govmm/govmm/vmm/sandbox"
)

// A program that embeds a VM enters the cage when everything is open and the guest has not
// run yet. This one would call vmm.NewVM before, and VM.Run after; here it only looks what
// the policy of such a VM is.
func Example() {
	policy := sandbox.Policy{
		Mode:    sandbox.Off, // On in earnest: this process could then not go on as it is
		Read:    []string{"/etc/hosts", "/etc/resolv.conf", "/srv/vm/disk.img"},
		Replace: []string{"/var/log/vm"}, // the guest's output, in a file that is rotated
		Ports:   []uint16{4444},          // of hosts that the guest may move to
	}
	status, err := policy.Enter()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(status)
	// Output: off
}
