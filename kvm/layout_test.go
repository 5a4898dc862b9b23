package kvm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// layout has C expressions, which gcc evaluates with the kernel's headers, and the
// values that this package uses.
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

// TestLayout compares sizes, offsets and numbers with the kernel's headers. Debian
// 12 has the headers of Linux 6.1, which define everything that this package uses,
// except KVM_EXIT_MEMORY_FAULT (6.8).
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
	l.saved()
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
		t.Fatalf("%d values of %d expressions", len(lines), len(l.expr))
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
	var pc pitConfig
	l.size("kvm_pit_config", unsafe.Sizeof(pc))
	l.at("kvm_pit_config", "flags", unsafe.Offsetof(pc.flags))
}

func (l *layout) vcpuStructs() {
	l.size("kvm_xsave", xsaveLegacySize)
	l.size("kvm_mp_state", unsafe.Sizeof(gokvm.MPState{}))
	var tr Translation
	l.size("kvm_translation", unsafe.Sizeof(tr))
	l.at("kvm_translation", "physical_address", unsafe.Offsetof(tr.PhysicalAddress))
	l.at("kvm_translation", "valid", unsafe.Offsetof(tr.Valid))
	l.at("kvm_translation", "writeable", unsafe.Offsetof(tr.Writeable))
	l.at("kvm_translation", "usermode", unsafe.Offsetof(tr.Usermode))
	l.size("kvm_cpuid2", cpuidHeaderSize)
	l.at("kvm_cpuid2", "entries", unsafe.Offsetof(cpuid2{}.entries))
	l.size("kvm_msr_list", 4)
	l.size("kvm_msrs", msrHeaderSize)
	l.at("kvm_msrs", "entries", unsafe.Offsetof(msrs{}.entries))
}

// saved compares the structs that are saved, field by field: the name of a
// field in CBOR is its name in the kernel's header.
func (l *layout) saved() {
	for name, value := range map[string]any{
		"kvm_clock_data":        ClockData{},
		"kvm_cpuid_entry2":      CPUIDEntry{},
		"kvm_debugregs":         DebugRegs{},
		"kvm_dtable":            Descriptor{},
		"kvm_irqchip":           IRQChip{},
		"kvm_lapic_state":       LAPICState{},
		"kvm_msr_entry":         MSR{},
		"kvm_pit_channel_state": PITChannel{},
		"kvm_pit_state2":        PITState2{},
		"kvm_regs":              Regs{},
		"kvm_segment":           Segment{},
		"kvm_sregs":             Sregs{},
		"kvm_sregs2":            Sregs2{},
		"kvm_vcpu_events":       VCPUEvents{},
		"kvm_xcr":               XCR{},
		"kvm_xcrs":              XCRS{},
	} {
		l.size(name, reflect.TypeOf(value).Size())
		l.fields(name, "", 0, reflect.TypeOf(value))
	}
}

// fields compares offset and size of every field of t, which begins at offset
// base of the kernel's struct name, inside its field outer.
func (l *layout) fields(name, outer string, base uintptr, t reflect.Type) {
	for i := range t.NumField() {
		f := t.Field(i)
		if f.Name == "_" {
			continue
		}
		field := outer + f.Tag.Get("cbor")
		l.at(name, field, base+f.Offset)
		l.add("sizeof(((struct "+name+" *)0)->"+field+")", f.Type.Size())
		if f.Type.Kind() == reflect.Struct {
			l.fields(name, field+".", base+f.Offset, f.Type)
		}
	}
}
