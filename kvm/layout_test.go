package kvm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// layout pairs C expressions, which gcc evaluates against the kernel's headers,
// with the numbers that this package uses.
type layout struct {
	expr []string
	want []uint64
}

func (l *layout) add(expr string, want uintptr) {
	l.expr = append(l.expr, expr)
	l.want = append(l.want, uint64(want))
}

// size compares a struct's size.
func (l *layout) size(name string, size uintptr) { l.add("sizeof(struct "+name+")", size) }

// at compares a field's offset.
func (l *layout) at(name, field string, offset uintptr) {
	l.add("offsetof(struct "+name+", "+field+")", offset)
}

// TestLayout compiles the kernel's headers and compares sizes, offsets and
// numbers with ours. Debian 12's headers are those of Linux 6.1, which have
// everything that is used here but KVM_EXIT_MEMORY_FAULT (6.8).
func TestLayout(t *testing.T) {
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("NO GCC HERE, layouts were not compared with the kernel's headers")
	}
	if _, err := os.Stat("/usr/include/linux/kvm.h"); err != nil {
		t.Skipf("NO KERNEL HEADERS HERE (linux-libc-dev), layouts were not compared: %v", err)
	}
	l := &layout{}
	l.vmStructs()
	l.vcpuStructs()
	l.runUnion()
	l.requests()
	l.constants()

	var c strings.Builder
	c.WriteString("#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\n#include <asm/prctl.h>\n" +
		"#define SHOW(x) printf(\"%llu\\n\", (unsigned long long)(x))\nint main(void) {\n")
	for _, e := range l.expr {
		fmt.Fprintf(&c, "#line 1 \"%s\"\nSHOW((%s));\n", strings.ReplaceAll(e, `"`, `'`), e)
	}
	c.WriteString("return 0;\n}\n")
	dir := t.TempDir()
	source, program := filepath.Join(dir, "layout.c"), filepath.Join(dir, "layout")
	check(t, os.WriteFile(source, []byte(c.String()), 0o644))
	if out, err := exec.Command(gcc, "-o", program, source).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	out, err := exec.Command(program).Output()
	check(t, err)
	lines := strings.Fields(string(out))
	if len(lines) != len(l.expr) {
		t.Fatalf("%d answers to %d questions", len(lines), len(l.expr))
	}
	for i, line := range lines {
		if want := fmt.Sprint(l.want[i]); line != want {
			t.Errorf("%s is %s in the kernel's headers, %s here", l.expr[i], line, want)
		}
	}
	t.Logf("%d numbers compared", len(lines))
}

func (l *layout) vmStructs() {
	var r gokvm.UserspaceMemoryRegion
	l.size("kvm_userspace_memory_region", unsafe.Sizeof(r))
	l.at("kvm_userspace_memory_region", "slot", unsafe.Offsetof(r.Slot))
	l.at("kvm_userspace_memory_region", "flags", unsafe.Offsetof(r.Flags))
	l.at("kvm_userspace_memory_region", "guest_phys_addr", unsafe.Offsetof(r.GuestPhysAddr))
	l.at("kvm_userspace_memory_region", "memory_size", unsafe.Offsetof(r.MemorySize))
	l.at("kvm_userspace_memory_region", "userspace_addr", unsafe.Offsetof(r.UserspaceAddr))
	var d dirtyLog
	l.size("kvm_dirty_log", unsafe.Sizeof(d))
	l.at("kvm_dirty_log", "slot", unsafe.Offsetof(d.slot))
	l.at("kvm_dirty_log", "dirty_bitmap", unsafe.Offsetof(d.bitmap))
	var g dirtyGFN
	l.size("kvm_dirty_gfn", unsafe.Sizeof(g))
	l.at("kvm_dirty_gfn", "flags", unsafe.Offsetof(g.flags))
	l.at("kvm_dirty_gfn", "slot", unsafe.Offsetof(g.slot))
	l.at("kvm_dirty_gfn", "offset", unsafe.Offsetof(g.offset))
	var c clearDirtyLog
	l.size("kvm_clear_dirty_log", unsafe.Sizeof(c))
	l.at("kvm_clear_dirty_log", "slot", unsafe.Offsetof(c.slot))
	l.at("kvm_clear_dirty_log", "num_pages", unsafe.Offsetof(c.pages))
	l.at("kvm_clear_dirty_log", "first_page", unsafe.Offsetof(c.first))
	l.at("kvm_clear_dirty_log", "dirty_bitmap", unsafe.Offsetof(c.bitmap))
	var e enableCap
	l.size("kvm_enable_cap", unsafe.Sizeof(e))
	l.at("kvm_enable_cap", "cap", unsafe.Offsetof(e.cap))
	l.at("kvm_enable_cap", "flags", unsafe.Offsetof(e.flags))
	l.at("kvm_enable_cap", "args", unsafe.Offsetof(e.args))
	var a deviceAttr
	l.size("kvm_device_attr", unsafe.Sizeof(a))
	l.at("kvm_device_attr", "group", unsafe.Offsetof(a.group))
	l.at("kvm_device_attr", "attr", unsafe.Offsetof(a.attr))
	l.at("kvm_device_attr", "addr", unsafe.Offsetof(a.addr))
	var i irqLevel
	l.size("kvm_irq_level", unsafe.Sizeof(i))
	l.at("kvm_irq_level", "irq", unsafe.Offsetof(i.gsi))
	l.at("kvm_irq_level", "level", unsafe.Offsetof(i.level))
	var f irqfd
	l.size("kvm_irqfd", unsafe.Sizeof(f))
	l.at("kvm_irqfd", "fd", unsafe.Offsetof(f.fd))
	l.at("kvm_irqfd", "gsi", unsafe.Offsetof(f.gsi))
	l.at("kvm_irqfd", "flags", unsafe.Offsetof(f.flags))
	l.at("kvm_irqfd", "resamplefd", unsafe.Offsetof(f.resample))
	var o ioeventfd
	l.size("kvm_ioeventfd", unsafe.Sizeof(o))
	l.at("kvm_ioeventfd", "datamatch", unsafe.Offsetof(o.datamatch))
	l.at("kvm_ioeventfd", "addr", unsafe.Offsetof(o.addr))
	l.at("kvm_ioeventfd", "len", unsafe.Offsetof(o.len))
	l.at("kvm_ioeventfd", "fd", unsafe.Offsetof(o.fd))
	l.at("kvm_ioeventfd", "flags", unsafe.Offsetof(o.flags))
	var re irqRoutingEntry
	l.size("kvm_irq_routing", irqRoutingHeaderSize)
	l.at("kvm_irq_routing", "entries", unsafe.Offsetof(irqRouting{}.entries))
	l.size("kvm_irq_routing_entry", unsafe.Sizeof(re))
	l.at("kvm_irq_routing_entry", "gsi", unsafe.Offsetof(re.gsi))
	l.at("kvm_irq_routing_entry", "type", unsafe.Offsetof(re.kind))
	l.at("kvm_irq_routing_entry", "flags", unsafe.Offsetof(re.flags))
	l.at("kvm_irq_routing_entry", "u.irqchip.irqchip", unsafe.Offsetof(re.union))
	l.at("kvm_irq_routing_entry", "u.irqchip.pin", unsafe.Offsetof(re.union)+4)
	l.at("kvm_irq_routing_entry", "u.msi.address_lo", unsafe.Offsetof(re.union))
	l.at("kvm_irq_routing_entry", "u.msi.address_hi", unsafe.Offsetof(re.union)+4)
	l.at("kvm_irq_routing_entry", "u.msi.data", unsafe.Offsetof(re.union)+8)
	var chip IRQChip
	l.size("kvm_irqchip", unsafe.Sizeof(chip))
	l.at("kvm_irqchip", "chip_id", unsafe.Offsetof(chip.ChipID))
	l.at("kvm_irqchip", "chip", unsafe.Offsetof(chip.Chip))
	var pc pitConfig
	l.size("kvm_pit_config", unsafe.Sizeof(pc))
	l.at("kvm_pit_config", "flags", unsafe.Offsetof(pc.flags))
	var p PITState2
	l.size("kvm_pit_state2", unsafe.Sizeof(p))
	l.at("kvm_pit_state2", "flags", unsafe.Offsetof(p.Flags))
	var ch gokvm.PITChannelState
	l.size("kvm_pit_channel_state", unsafe.Sizeof(ch))
	l.at("kvm_pit_channel_state", "latched_count", unsafe.Offsetof(ch.LatchedCount))
	l.at("kvm_pit_channel_state", "status", unsafe.Offsetof(ch.Status))
	l.at("kvm_pit_channel_state", "rw_mode", unsafe.Offsetof(ch.RWMode))
	l.at("kvm_pit_channel_state", "gate", unsafe.Offsetof(ch.Gate))
	l.at("kvm_pit_channel_state", "count_load_time", unsafe.Offsetof(ch.CountLoadTime))
	var k ClockData
	l.size("kvm_clock_data", unsafe.Sizeof(k))
	l.at("kvm_clock_data", "clock", unsafe.Offsetof(k.Clock))
	l.at("kvm_clock_data", "flags", unsafe.Offsetof(k.Flags))
	l.at("kvm_clock_data", "realtime", unsafe.Offsetof(k.Realtime))
	l.at("kvm_clock_data", "host_tsc", unsafe.Offsetof(k.HostTSC))
}

func (l *layout) vcpuStructs() {
	var r Regs
	l.size("kvm_regs", unsafe.Sizeof(r))
	l.at("kvm_regs", "rsp", unsafe.Offsetof(r.RSP))
	l.at("kvm_regs", "rdi", unsafe.Offsetof(r.RDI))
	l.at("kvm_regs", "r15", unsafe.Offsetof(r.R15))
	l.at("kvm_regs", "rip", unsafe.Offsetof(r.RIP))
	l.at("kvm_regs", "rflags", unsafe.Offsetof(r.RFLAGS))
	var g Segment
	l.size("kvm_segment", unsafe.Sizeof(g))
	l.at("kvm_segment", "limit", unsafe.Offsetof(g.Limit))
	l.at("kvm_segment", "selector", unsafe.Offsetof(g.Selector))
	l.at("kvm_segment", "type", unsafe.Offsetof(g.Typ))
	l.at("kvm_segment", "present", unsafe.Offsetof(g.Present))
	l.at("kvm_segment", "dpl", unsafe.Offsetof(g.DPL))
	l.at("kvm_segment", "db", unsafe.Offsetof(g.DB))
	l.at("kvm_segment", "s", unsafe.Offsetof(g.S))
	l.at("kvm_segment", "l", unsafe.Offsetof(g.L))
	l.at("kvm_segment", "g", unsafe.Offsetof(g.G))
	l.at("kvm_segment", "avl", unsafe.Offsetof(g.AVL))
	l.at("kvm_segment", "unusable", unsafe.Offsetof(g.Unusable))
	var dt Descriptor
	l.size("kvm_dtable", unsafe.Sizeof(dt))
	l.at("kvm_dtable", "limit", unsafe.Offsetof(dt.Limit))
	var s Sregs
	l.size("kvm_sregs", unsafe.Sizeof(s))
	l.at("kvm_sregs", "tr", unsafe.Offsetof(s.TR))
	l.at("kvm_sregs", "gdt", unsafe.Offsetof(s.GDT))
	l.at("kvm_sregs", "cr0", unsafe.Offsetof(s.CR0))
	l.at("kvm_sregs", "efer", unsafe.Offsetof(s.EFER))
	l.at("kvm_sregs", "apic_base", unsafe.Offsetof(s.ApicBase))
	l.at("kvm_sregs", "interrupt_bitmap", unsafe.Offsetof(s.InterruptBitmap))
	var s2 Sregs2
	l.size("kvm_sregs2", unsafe.Sizeof(s2))
	l.at("kvm_sregs2", "cr8", unsafe.Offsetof(s2.CR8))
	l.at("kvm_sregs2", "apic_base", unsafe.Offsetof(s2.APICBase))
	l.at("kvm_sregs2", "flags", unsafe.Offsetof(s2.Flags))
	l.at("kvm_sregs2", "pdptrs", unsafe.Offsetof(s2.PDptrs))
	var d DebugRegs
	l.size("kvm_debugregs", unsafe.Sizeof(d))
	l.at("kvm_debugregs", "dr6", unsafe.Offsetof(d.DR6))
	l.at("kvm_debugregs", "dr7", unsafe.Offsetof(d.DR7))
	l.at("kvm_debugregs", "flags", unsafe.Offsetof(d.Flags))
	var x XCRS
	l.size("kvm_xcrs", unsafe.Sizeof(x))
	l.at("kvm_xcrs", "xcrs", unsafe.Offsetof(x.Registers))
	l.size("kvm_xcr", unsafe.Sizeof(gokvm.XRC{}))
	l.at("kvm_xcr", "value", unsafe.Offsetof(gokvm.XRC{}.Value))
	l.size("kvm_xsave", xsaveLegacySize)
	l.size("kvm_nested_state", nestedHeaderSize)
	l.at("kvm_nested_state", "size", nestedSizeAt)
	l.size("kvm_lapic_state", unsafe.Sizeof(LAPICState{}))
	l.size("kvm_mp_state", unsafe.Sizeof(gokvm.MPState{}))
	var tr Translation
	l.size("kvm_translation", unsafe.Sizeof(tr))
	l.at("kvm_translation", "physical_address", unsafe.Offsetof(tr.PhysicalAddress))
	l.at("kvm_translation", "valid", unsafe.Offsetof(tr.Valid))
	l.at("kvm_translation", "writeable", unsafe.Offsetof(tr.Writeable))
	l.at("kvm_translation", "usermode", unsafe.Offsetof(tr.Usermode))
	var c CPUIDEntry
	l.size("kvm_cpuid2", cpuidHeaderSize)
	l.at("kvm_cpuid2", "entries", unsafe.Offsetof(cpuid2{}.entries))
	l.size("kvm_cpuid_entry2", unsafe.Sizeof(c))
	l.at("kvm_cpuid_entry2", "flags", unsafe.Offsetof(c.Flags))
	l.at("kvm_cpuid_entry2", "eax", unsafe.Offsetof(c.Eax))
	l.at("kvm_cpuid_entry2", "edx", unsafe.Offsetof(c.Edx))
	var m MSR
	l.size("kvm_msr_list", 4)
	l.size("kvm_msrs", msrHeaderSize)
	l.at("kvm_msrs", "entries", unsafe.Offsetof(msrs{}.entries))
	l.size("kvm_msr_entry", unsafe.Sizeof(m))
	l.at("kvm_msr_entry", "data", unsafe.Offsetof(m.Data))
	l.events()
}

func (l *layout) events() {
	var e VCPUEvents
	l.size("kvm_vcpu_events", unsafe.Sizeof(e))
	l.at("kvm_vcpu_events", "exception.injected", unsafe.Offsetof(e.Exception.Injected))
	l.at("kvm_vcpu_events", "exception.nr", unsafe.Offsetof(e.Exception.Nr))
	l.at("kvm_vcpu_events", "exception.has_error_code", unsafe.Offsetof(e.Exception.HasErrorCode))
	l.at("kvm_vcpu_events", "exception.pending", unsafe.Offsetof(e.Exception.Pending))
	l.at("kvm_vcpu_events", "exception.error_code", unsafe.Offsetof(e.Exception.ErrorCode))
	l.at("kvm_vcpu_events", "interrupt.injected", unsafe.Offsetof(e.Interrupt))
	l.at("kvm_vcpu_events", "interrupt.nr", unsafe.Offsetof(e.Interrupt)+unsafe.Offsetof(e.Interrupt.Nr))
	l.at("kvm_vcpu_events", "interrupt.soft", unsafe.Offsetof(e.Interrupt)+unsafe.Offsetof(e.Interrupt.Soft))
	l.at("kvm_vcpu_events", "interrupt.shadow", unsafe.Offsetof(e.Interrupt)+unsafe.Offsetof(e.Interrupt.Shadow))
	l.at("kvm_vcpu_events", "nmi.injected", unsafe.Offsetof(e.NMI))
	l.at("kvm_vcpu_events", "nmi.pending", unsafe.Offsetof(e.NMI)+unsafe.Offsetof(e.NMI.Pending))
	l.at("kvm_vcpu_events", "nmi.masked", unsafe.Offsetof(e.NMI)+unsafe.Offsetof(e.NMI.Masked))
	l.at("kvm_vcpu_events", "sipi_vector", unsafe.Offsetof(e.SIPIVector))
	l.at("kvm_vcpu_events", "flags", unsafe.Offsetof(e.Flags))
	l.at("kvm_vcpu_events", "smi.smm", unsafe.Offsetof(e.SMI))
	l.at("kvm_vcpu_events", "smi.pending", unsafe.Offsetof(e.SMI)+unsafe.Offsetof(e.SMI.Pending))
	l.at("kvm_vcpu_events", "smi.smm_inside_nmi", unsafe.Offsetof(e.SMI)+unsafe.Offsetof(e.SMI.SMMInsideNMI))
	l.at("kvm_vcpu_events", "smi.latched_init", unsafe.Offsetof(e.SMI)+unsafe.Offsetof(e.SMI.LatchedInit))
	l.at("kvm_vcpu_events", "triple_fault.pending", unsafe.Offsetof(e.TripleFault))
	l.at("kvm_vcpu_events", "exception_has_payload", unsafe.Offsetof(e.ExceptionHasPayload))
	l.at("kvm_vcpu_events", "exception_payload", unsafe.Offsetof(e.ExceptionPayload))
}
