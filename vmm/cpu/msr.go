package cpu

import (
	"errors"
	"fmt"
	"slices"

	"github.com/govmm/govmm/kvm"
)

// MSRs that need special treatment (arch/x86/include/asm/msr-index.h,
// Documentation/virt/kvm/x86/msr.rst).
const (
	MSRTSC          = 0x10
	msrWallClockOld = 0x11
	msrTSCDeadline  = 0x6e0
	msrVMXFirst     = 0x480
	msrVMXLast      = 0x493
	msrHyperVFirst  = 0x40000000
	msrHyperVLast   = 0x400001ff
	msrKVMWallClock = 0x4b564d00
	msrKVMAsyncPF   = 0x4b564d02
	msrSVMControl   = 0xc0010114
	msrSVMHostSave  = 0xc0010117
)

// unlistedMSRs have state that a guest can change, and some kernels leave them out
// of KVM_GET_MSR_INDEX_LIST: memory types, machine checks, and additions of later
// processors. One that a vCPU does not have is skipped.
var unlistedMSRs = func() []uint32 {
	list := []uint32{
		0x48,         // SPEC_CTRL
		0x17a,        // MCG_STATUS
		0x1a0,        // MISC_ENABLE
		0x1c4, 0x1c5, // XFD, XFD_ERR
		0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f, // MTRRfix*
		0x277,      // PAT
		0xda0,      // XSS
		0xc0000103, // TSC_AUX
	}
	for i := range uint32(16) {
		list = append(list, 0x200+i) // MTRRphysBase0 to MTRRphysMask7
	}
	for i := range uint32(4 * 32) {
		list = append(list, 0x400+i) // MC0_CTL to MC31_MISC
	}
	return append(list, 0x2ff) // MTRRdefType: what turns the others on comes last
}()

// SavedMSRs returns the MSRs that travel with a vCPU: those that the kernel lists
// (KVM_GET_MSR_INDEX_LIST) and those that it has besides, without the ones that
// stay on the host.
func SavedMSRs(list []uint32) []uint32 {
	all := slices.Clone(list)
	for _, index := range unlistedMSRs {
		if !slices.Contains(list, index) {
			all = append(all, index)
		}
	}
	return slices.DeleteFunc(all, staysHere)
}

// staysHere says which MSRs do not travel:
//   - the TSC, which goes by its offset (clock.go);
//   - the wall clocks. Setting one makes the kernel write the time into guest
//     memory, which the guest asked for once and has read;
//   - what belongs to features that no guest is given: VMX, SVM and Hyper-V.
func staysHere(index uint32) bool {
	switch index {
	case MSRTSC, msrWallClockOld, msrKVMWallClock, msrSVMControl, msrSVMHostSave:
		return true
	}
	return index >= msrVMXFirst && index <= msrVMXLast || index >= msrHyperVFirst && index <= msrHyperVLast
}

// ReadMSRs reads those of the MSRs that the vCPU has.
func ReadMSRs(v *kvm.VCPU, indices []uint32) ([]kvm.MSR, error) {
	list, err := v.GetMSRs(indices)
	if refused := (*kvm.MSRError)(nil); errors.As(err, &refused) {
		err = nil
	}
	return list, err
}

// CheckMSRs reports which MSRs of a peer this host does not load into a guest with this
// CPUID: known are those that it would have saved itself ([SavedMSRs]), each once. What
// is zero, or the guest's CPUID does not show, is no fault; [LoadMSRs] leaves it out.
func CheckMSRs(cpuid []kvm.CPUIDEntry, known []uint32, saved []kvm.MSR) error {
	if isPart(saved, known) {
		return nil
	}
	const most = 8 // of what a peer wrote, in one line
	var errs []error
	bad := func(format string, args ...any) {
		if len(errs) < most {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	has, seen := setOf(known), map[uint32]bool{}
	for _, m := range saved {
		switch {
		case seen[m.Index]:
			bad("MSR %s: is there twice", msrName(m.Index))
		case !has[m.Index] && m.Data != 0 && shows(cpuid, m.Index):
			bad("MSR %s: is %#x in the guest, and this host would not have saved it", msrName(m.Index), m.Data)
		}
		seen[m.Index] = true
	}
	return errors.Join(errs...)
}

// isPart says that the MSRs are some of the list, in its order: what the same version
// on the same kernel has saved.
func isPart(saved []kvm.MSR, list []uint32) bool {
	i := 0
	for _, m := range saved {
		for i < len(list) && list[i] != m.Index {
			i++
		}
		if i == len(list) {
			return false
		}
		i++
	}
	return true
}

func setOf(list []uint32) map[uint32]bool {
	set := make(map[uint32]bool, len(list))
	for _, index := range list {
		set[index] = true
	}
	return set
}

// loadable returns those of the MSRs that are known.
func loadable(known []uint32, saved []kvm.MSR) []kvm.MSR {
	if isPart(saved, known) {
		return saved
	}
	has := setOf(known)
	return slices.DeleteFunc(slices.Clone(saved), func(m kvm.MSR) bool { return !has[m.Index] })
}

// LoadMSRs loads those of the MSRs that are known, have passed [CheckMSRs], and differ from
// the values of the new vCPU. Some MSRs can be read but not set, or set to one value only.
// That is fine as long as they have the right value, or the guest's CPUID does not show
// them; otherwise the error names all of them.
func LoadMSRs(v *kvm.VCPU, cpuid []kvm.CPUIDEntry, known []uint32, saved []kvm.MSR) error {
	saved = loadable(known, saved)
	indices := make([]uint32, 0, len(saved))
	for _, m := range saved {
		indices = append(indices, m.Index)
	}
	fresh, err := ReadMSRs(v, indices)
	if err != nil {
		return err
	}
	have := make(map[uint32]uint64, len(fresh))
	for _, m := range fresh {
		have[m.Index] = m.Data
	}
	var load []kvm.MSR
	for _, m := range saved {
		if now, ok := have[m.Index]; (ok && now == m.Data) || (!ok && m.Data == 0) {
			continue // an MSR that does not exist here is as good as 0
		}
		load = append(load, kvm.MSR{Index: m.Index, Data: m.Data})
	}
	slices.SortStableFunc(load, func(a, b kvm.MSR) int { return turn(a.Index) - turn(b.Index) })

	_, err = v.SetMSRs(load)
	refused := (*kvm.MSRError)(nil)
	if !errors.As(err, &refused) {
		return err
	}
	var errs []error
	for _, m := range load {
		if !slices.Contains(refused.Refused, m.Index) || !shows(cpuid, m.Index) {
			continue
		}
		found := "no such MSR"
		if now, ok := have[m.Index]; ok {
			found = fmt.Sprintf("%#x, which this host's KVM does not change to that", now)
		}
		errs = append(errs, fmt.Errorf("vCPU %d: MSR %s: expected %#x as in the guest, found %s", v.ID(), msrName(m.Index), m.Data, found))
	}
	return errors.Join(errs...)
}

// turn is where an MSR stands in the order of loading, which otherwise is the
// kernel's: the vector of asynchronous page faults before they are turned on, and
// the deadline after everything that can change the time.
func turn(index uint32) int {
	switch index {
	case msrKVMAsyncPF:
		return 1
	case msrTSCDeadline:
		return 2
	}
	return 0
}
