package machine

import (
	"errors"
	"os"
	"sync"
	"time"

	"github.com/govmm/govmm/internal/bootid"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/vmm/memory"
)

// PrepareToReceive opens and reads what machines of this process will need of this host
// beside their devices, so that it can go into a sandbox before it knows which machine
// it will get. [New] does so for its own machine, and for those after a reset.
func PrepareToReceive() error {
	memory.Prepare()
	_ = memory.PrepareMissing() // who needs it gets the error
	_, err := kvm.Shared()
	readHost()
	return err
}

// readHost reads what does not change while this process runs, and may be asked for late.
func readHost() {
	bootid.ID()
	softwareKVM()
	_, _ = time.Now().Zone() // loads the time zone, for the times in answers
}

// softwareKVM says whether neither of the hardware modules is loaded: KVM then runs
// guests in some other way.
var softwareKVM = sync.OnceValue(func() bool {
	for _, module := range []string{"kvm_intel", "kvm_amd"} {
		// Also if it may not be looked at: it is there.
		if _, err := os.Stat("/sys/module/" + module); !errors.Is(err, os.ErrNotExist) {
			return false
		}
	}
	return true
})
