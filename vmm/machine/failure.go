package machine

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/govmm/govmm/kvm"
)

// This file explains in one line why a guest cannot go on. All of it is called on
// the vCPU's own thread, after an exit.

// place is where a vCPU was.
type place struct {
	rip    uint64
	linear uint64
	ring   uint8
	code   []byte // what lies there, nil if that cannot be read
	known  bool
	reset  bool // at the reset vector
}

// whereabouts reads the vCPU's registers.
func (c *vcpu) whereabouts() (p place) {
	regs, err := c.kvm.GetRegs()
	if err != nil {
		return p
	}
	sregs, err := c.kvm.GetSregs()
	if err != nil {
		return p
	}
	p = place{rip: regs.RIP, linear: regs.RIP, ring: uint8(sregs.CS.Selector & 3), known: true}
	// The reset vector: Intel SDM volume 3, table 10-1.
	p.reset = regs.RIP == 0xfff0 && sregs.CS.Base == 0xffff0000
	if sregs.CS.L == 0 { // outside of 64-bit code segments have a base
		p.linear = uint64(uint32(regs.RIP + sregs.CS.Base))
	}
	if sregs.CR0&1 == 0 {
		p.ring = 0 // real mode
	}
	p.code = c.code(p.linear)
	return p
}

// code reads the instruction at a linear address, and what follows in its page.
func (c *vcpu) code(linear uint64) []byte {
	t, err := c.kvm.Translate(linear)
	if err != nil || t.Valid == 0 {
		return nil
	}
	const longest = 15 // Intel SDM volume 2, 2.3.11
	code := make([]byte, min(longest, 0x1000-linear&0xfff))
	if c.machine.mem.ReadAt(code, t.PhysicalAddress) != nil {
		return nil
	}
	return code
}

// where ends a message with the vCPU's place.
func (c *vcpu) where() string { return c.whereabouts().where() }

func (p place) where() string {
	if !p.known {
		return ""
	}
	return ", at " + p.String()
}

func (p place) String() string {
	if p.code == nil {
		return fmt.Sprintf("RIP %#x, where no RAM is mapped", p.rip)
	}
	return fmt.Sprintf("RIP %#x in ring %d, instruction bytes % x", p.rip, p.ring, p.code)
}

func (c *vcpu) tripleFault() error {
	p := c.whereabouts()
	where := p.where()
	if p.reset { // APM volume 2, 15.14.3: the VMCB says nothing after a shutdown
		where = ", which KVM has reset since, as on AMD's processors, so that where it was is not known"
	}
	return fmt.Errorf("triple fault of vCPU %d%s: the guest has no handler for an exception, "+
		"and none for the double fault", c.kvm.ID(), where)
}

func (c *vcpu) failEntry(e kvm.FailEntryExit) error {
	return fmt.Errorf("the processor refused to enter vCPU %d (KVM_EXIT_FAIL_ENTRY, hardware reason %#x, host CPU %d)%s: "+
		"the guest has put its vCPU into a state that is not valid", c.kvm.ID(), e.Reason, e.CPU, c.where())
}

// internalError explains KVM_EXIT_INTERNAL_ERROR.
func (c *vcpu) internalError(e kvm.InternalErrorExit) error {
	p := c.whereabouts()
	if code := e.Instruction(); code != nil {
		p.code = code
	}
	var b strings.Builder
	fmt.Fprintf(&b, "KVM cannot go on with vCPU %d (KVM_EXIT_INTERNAL_ERROR, suberror %d: %s)", c.kvm.ID(), e.Suberror, suberror(e))
	if p.known {
		fmt.Fprintf(&b, ", at %v", p)
	}
	if e.Suberror == kvm.InternalErrorEmulation {
		b.WriteString(": " + explainEmulation(p, softwareKVM()))
	}
	return fmt.Errorf("%s", b.String())
}

// suberror names the suberror, with the kernel's data where it is not text.
func suberror(e kvm.InternalErrorExit) string {
	name, ok := map[uint32]string{
		kvm.InternalErrorEmulation:      "emulation failure",
		kvm.InternalErrorSimulEx:        "two exceptions at once",
		kvm.InternalErrorDeliveryEv:     "an exit during event delivery",
		kvm.InternalErrorUnexpectedExit: "an unexpected exit of the processor",
	}[e.Suberror]
	if !ok {
		name = "unknown"
	}
	if e.Suberror != kvm.InternalErrorEmulation && len(e.Data) > 0 {
		name = fmt.Sprintf("%s, data %#x", name, e.Data)
	}
	return name
}

// explainEmulation says what an emulation failure means and what to do.
func explainEmulation(p place, software bool) string {
	name := instruction(p.code)
	switch {
	case p.known && p.code == nil:
		return "the guest jumped to an address that is not RAM"
	case software && p.ring == 0:
		if name == "" {
			name = "this instruction"
		}
		return "this host's KVM works without VT-x or SVM and emulates ring 0 in software, and cannot emulate " + name +
			"; build the guest's kernel without it, or run the guest on a host with hardware virtualisation"
	case name != "":
		return "KVM had to emulate the instruction, " + name + ", and cannot"
	}
	return "KVM had to emulate the instruction, which it does for accesses to devices, and cannot"
}

// instruction names the instruction if it is one that a KVM without hardware support
// does not emulate, as far as is known; otherwise it returns "".
func instruction(code []byte) string {
	repeat, wide := false, false
	for len(code) > 0 {
		switch b := code[0]; {
		case b == 0xf3:
			repeat = true
		case b == 0x66 || b == 0xf0 || b == 0xf2 || b == 0x67 || b == 0x2e || b == 0x36 || b == 0x3e || b == 0x26 || b == 0x64 || b == 0x65:
		case b&0xf0 == 0x40:
			wide = b&8 != 0 // REX
		default:
			return opcode(code, repeat, wide)
		}
		code = code[1:]
	}
	return ""
}

func opcode(code []byte, repeat, wide bool) string {
	field := -1 // the reg field of ModRM behind a two-byte opcode
	if len(code) > 2 {
		field = int(code[2] >> 3 & 7)
	}
	switch {
	case code[0] == 0x9b:
		return "FWAIT"
	case code[0] == 0xcc:
		return "INT3"
	case bytes.HasPrefix(code, []byte{0x0f, 0x0b}):
		return "UD2"
	case bytes.HasPrefix(code, []byte{0x0f, 0xae}) && field == 4:
		return "XSAVE"
	case bytes.HasPrefix(code, []byte{0x0f, 0xae}) && field == 5:
		return "XRSTOR"
	case bytes.HasPrefix(code, []byte{0x0f, 0xae}) && field == 6:
		return "XSAVEOPT"
	case bytes.HasPrefix(code, []byte{0x0f, 0xc7}) && field == 1 && wide:
		return "CMPXCHG16B"
	case bytes.HasPrefix(code, []byte{0x0f, 0xb8}) && repeat:
		return "POPCNT"
	}
	return ""
}
