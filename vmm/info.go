package vmm

import (
	"os"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/sandbox"
)

// State is what a VM is doing.
type State string

// The states of a VM.
const (
	StateRunning        State = "running"
	StatePaused         State = "paused"
	StateReceiving      State = "receiving"       // waits for a guest, or for the rest of one
	StatePanicked       State = "panicked"        // the guest's kernel has reported a panic
	StateMigrating      State = "migrating"       // away from here; the guest runs, or is paused
	StateMigrated       State = "migrated"        // the guest runs elsewhere
	StateHandoffUnknown State = "handoff-unknown" // the guest stands still here and may run elsewhere
	StateStopped        State = "stopped"
)

// Info describes a VM at one moment. Fields that are not known yet, as long as a
// receiver waits, are zero.
type Info struct {
	Name    string `json:"name"`
	PID     int    `json:"pid"` // of this process
	State   State  `json:"state"`
	Address string `json:"address"` // that a receiver waits at, otherwise ""
	CPUs    int    `json:"cpus"`
	Memory  uint64 `json:"memory"` // bytes
	// Kernel is "demo guest", "ELF" or "bzImage".
	Kernel string `json:"kernel,omitempty"`
	// Panicked says that the guest's kernel has panicked since it started, in
	// whatever state the VM is.
	Panicked bool    `json:"panicked,omitempty"`
	Devices  Devices `json:"devices,omitzero"`
	// Sandbox is what the process of the VM has given up.
	Sandbox sandbox.Status `json:"sandbox"`
	// Migration is the migration from here that is under way or was the last.
	Migration *migrate.Progress `json:"migration,omitempty"`
	// MissingPages is how many pages of the guest's memory have not come yet from the host that it left (postcopy).
	MissingPages uint64 `json:"missing_pages,omitempty"`
	// Incoming is the migration to here that is under way.
	Incoming *migrate.ReceiveProgress `json:"incoming,omitempty"`
}

// Info returns what the VM is doing. It does not wait for anything.
func (v *VM) Info() Info {
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	i := Info{Name: v.name, PID: os.Getpid(), State: v.state(), Sandbox: sandbox.Current()}
	m := v.machine
	if m == nil {
		m = v.incoming
	}
	if m != nil {
		spec := m.Spec()
		i.CPUs, i.Memory, i.Kernel, i.Panicked = spec.CPUs, spec.Memory, m.KernelKind(), m.Panicked()
		i.Devices = m.Devices()
		i.MissingPages = m.MissingPages()
		if i.Name == "" {
			i.Name = spec.Name
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
	case o != nil && o.succeeded() && o.keeps != nil:
		return StateStopped
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
