package machine

import (
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/vmm/cpu"
)

// TestModelsAreSet: a vCPU has the CPUID of the machine's model, on a KVM that intercepts
// CPUID.
func TestModelsAreSet(t *testing.T) {
	needKVM(t)
	for _, model := range cpu.Models() {
		t.Run(model, func(t *testing.T) {
			spec := testSpec(t, 2, vmtest.JustCount)
			spec, err := spec.Complete(model)
			if err != nil && strings.Contains(err.Error(), "CPU "+model+": this host lacks ") {
				t.Log(err) // expected on a host without these features
				return
			}
			check(t, err)
			m := fromSpec(t, spec, nil)
			got, err := m.vcpus[1].kvm.GetCPUID2()
			check(t, err)
			const brand, topology = 0x80000002, 0xb
			find := func(list []kvm.CPUIDEntry, function, index uint32) (none kvm.CPUIDEntry) {
				for _, e := range list {
					if e.Function == function && e.Index == index {
						return e
					}
				}
				return none
			}
			if model != cpu.Host && find(got, brand, 0) != find(spec.CPUID, brand, 0) {
				t.Log("this KVM does not intercept CPUID: the guest sees the host's")
			} else if e := find(got, topology, 1); model != cpu.Host && (e.Edx != 1 || e.Ebx != 2) {
				t.Errorf("topology of vCPU 1: %+v", e)
			}
		})
	}
}

// Test32VCPUs wakes 31 vCPUs with INIT and SIPI. Each adds one to a counter.
func Test32VCPUs(t *testing.T) {
	const cpus = 32
	m := newMachine(t, cpus, vmtest.WakeAndCount, nil)
	check(t, m.mem.WriteAt([]byte{ // 16 bits
		0x31, 0xc0, // xor %ax,%ax
		0x8e, 0xd8, // mov %ax,%ds
		0xf0, 0x66, 0xff, 0x06, 0x00, 0x90, // lock incl 0x9000
		0xf4,       // hlt
		0xeb, 0xfd, // jmp back
	}, vmtest.APCodeAt))
	check(t, m.Start(false))
	for deadline := vmtest.Within(t); word(t, m, vmtest.APCountAt) != cpus-1; time.Sleep(time.Millisecond) {
		if deadline.Err() != nil {
			t.Fatalf("%d of %d have woken", word(t, m, vmtest.APCountAt), cpus-1)
		}
	}
	check(t, m.Pause(t.Context()))
	for id := range uint32(cpus) {
		lapic, err := m.vcpus[id].kvm.GetLAPIC()
		check(t, err)
		if got := lapic.Regs[0x20+3]; uint32(got) != id {
			t.Errorf("vCPU %d has APIC id %d", id, got)
		}
	}
}
