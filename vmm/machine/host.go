package machine

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

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
	available  func(memory.Backing) (uint64, error) // bytes
}

// thisHost asks KVM. It makes a VM for a moment, since only a vCPU reports the
// frequency of the TSC.
func thisHost(sys *kvm.System) (_ host, err error) {
	h := host{capability: sys.CheckExtension, available: availableMemory}
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
	vm, err := sys.CreateVM()
	if err != nil {
		return h, err
	}
	defer func() { err = errors.Join(err, vm.Close()) }()
	v, err := vm.CreateVCPU(0)
	if err != nil {
		return h, err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	h.tscKHz, err = v.TSCKHz()
	return h, err
}

// availableMemory returns how many bytes of this backing the host can provide without
// swapping.
func availableMemory(b memory.Backing) (uint64, error) {
	if b == memory.Hugetlb {
		pages, err := meminfo("HugePages_Free")
		if err != nil {
			return 0, err
		}
		size, err := meminfo("Hugepagesize")
		return pages * size * 1024, err
	}
	kib, err := meminfo("MemAvailable")
	return kib * 1024, err
}

// fitsHost refuses memory that this host could not provide even if nothing else ran:
// KVM's own tables for it would take all that there is.
func fitsHost(size uint64) error {
	total, err := meminfo("MemTotal")
	if err != nil {
		return err
	}
	swap, err := meminfo("SwapTotal")
	if err != nil {
		return err
	}
	if most := (total + swap) * 1024; size > most {
		return fmt.Errorf("memory of %d MiB: this host has %d MiB in total", size>>20, most>>20)
	}
	return nil
}

// meminfo returns a number of /proc/meminfo (proc_meminfo(5)): a count, or kiB.
func meminfo(key string) (uint64, error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, rest, ok := strings.Cut(lines.Text(), ":")
		if !ok || name != key {
			continue
		}
		number, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
		return strconv.ParseUint(number, 10, 64)
	}
	return 0, fmt.Errorf("/proc/meminfo has no %s", key)
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
