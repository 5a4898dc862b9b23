package vmm

import (
	"os"

	"github.com/govmm/govmm/migrate"
)

// State is what a VM is doing.
type State string

// The states of a VM.
const (
	StateRunning        State = "running"
	StatePaused         State = "paused"
	StateReceiving      State = "receiving"       // waits for a guest, or for the rest of one
	StatePanicked       State = "panicked"        // the guest's kernel has told that it panicked
	StateMigrating      State = "migrating"       // away from here; the guest runs, or is paused
	StateMigrated       State = "migrated"        // the guest runs elsewhere
	StateHandoffUnknown State = "handoff-unknown" // the guest stands still here and may run elsewhere
	StateStopped        State = "stopped"
)

// Info describes a VM at one moment.
type Info struct {
	Name    string
	PID     int // of this process
	State   State
	Address string // host:port that a receiver waits at, else ""
	CPUs    int    // 0: not known yet
	Memory  uint64 // bytes; 0: not known yet
	Kernel  string // what kind of file it is; "": not known yet
	// Panicked says that the guest's kernel has panicked since it started, in
	// whatever state the VM is.
	Panicked bool
	// Devices are nil as long as they are not known.
	Devices *DeviceInfo
	// Migration is the migration from here that is under way or was the last.
	Migration *migrate.Progress
	// Incoming is the migration to here that is under way.
	Incoming *migrate.ReceiveProgress
}

// Info returns what the VM is doing. It does not wait for anything.
func (v *VM) Info() Info {
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	i := Info{Name: v.name, PID: os.Getpid(), State: v.state()}
	m := v.machine
	if m == nil {
		m = v.incoming
	}
	if m != nil {
		i.CPUs, i.Memory, i.Kernel, i.Panicked = m.spec.CPUs, m.spec.Memory, m.spec.kernelKind(), m.Panicked()
		i.Devices = m.deviceInfo()
		if i.Name == "" {
			i.Name = m.spec.Name
		}
	}
	if i.State == StateReceiving {
		i.Address = v.listener.Addr().String()
		if p := v.receiver.Progress(); p.Active {
			i.Incoming = &p
		}
	}
	if v.outgoing != nil {
		p := v.outgoing.Progress()
		i.Migration = &p
	}
	return i
}

// state is what the VM is doing. lifeMu is held.
func (v *VM) state() State {
	o := v.outgoing
	switch {
	case v.life == lifeMigrated || o != nil && o.succeeded():
		return StateMigrated
	case v.life == lifeEnded:
		return StateStopped
	case v.machine == nil:
		return StateReceiving
	case o != nil && !o.isSettled() && o.Progress().Phase == migrate.PhaseHandoffUnknown:
		return StateHandoffUnknown
	case o != nil && !o.isSettled():
		return StateMigrating
	case v.machine.Paused():
		return StatePaused
	case v.machine.Panicked():
		return StatePanicked
	}
	return StateRunning
}
