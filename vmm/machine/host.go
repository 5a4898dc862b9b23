package machine

import (
	"errors"

	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/vmm/cpu"
	"github.com/govmm/govmm/vmm/memory"
)

// host is what this host offers and a guest can depend on.
type host struct {
	cpuid      []kvm.CPUIDEntry // as cpu.Supported
	tscKHz     uint64
	tscControl bool // the guest's TSC may run at another frequency
	maxCPUs    int
	capability func(kvm.Capability) (int, error)
	admit      func(size uint64, b memory.Backing, overcommit bool) error // [memory.Admit]
}

// thisHost asks KVM. If withTSC is set it makes a VM for a moment, since only a vCPU
// reports the frequency of the TSC; otherwise createVCPUs compares that.
func thisHost(sys *kvm.System, withTSC bool) (_ host, err error) {
	h := host{capability: sys.CheckExtension, admit: memory.Admit}
	if h.cpuid, err = cpu.Supported(sys); err != nil {
		return h, err
	}
	n, err := sys.CheckExtension(kvm.CapTSCControl)
	if err != nil {
		return h, err
	}
	h.tscControl = n > 0
	if h.maxCPUs, err = sys.CheckExtension(kvm.CapMaxVCPUs); err != nil {
		return h, err
	}
	if !withTSC {
		h.tscControl = true
		return h, nil
	}
	vm, err := sys.CreateVM()
	if err != nil {
		return h, err
	}
	v, err := vm.CreateVCPU(0)
	if err != nil {
		return h, errors.Join(err, vm.Close())
	}
	h.tscKHz, err = v.TSCKHz()
	// The kernel waits for grace periods when it frees a VM: on a busy host for longer
	// than all else takes here, and a source waits for the answer.
	go func() { _ = errors.Join(v.Close(), vm.Close()) }()
	return h, err
}

// needs lists the capabilities that the state of a machine with these depends
// on: what is not optional on any kernel, and those of this one that change
// the state's form.
func needs(c caps) []uint32 {
	list := []kvm.Capability{
		kvm.CapIRQChip, kvm.CapPIT2, kvm.CapPITState2, kvm.CapMPState, kvm.CapVCPUEvents, kvm.CapDebugRegs,
		kvm.CapXSAVE, kvm.CapXCRS, kvm.CapAdjustClock, kvm.CapImmediateExit,
	}
	if c.sregs2 {
		list = append(list, kvm.CapSREGS2)
	}
	out := make([]uint32, len(list))
	for i, n := range list {
		out[i] = uint32(n)
	}
	return out
}
