package machine

import (
	"errors"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/vmtest"
)

// TestGuestEnds: a guest ends the machine in each possible way.
func TestGuestEnds(t *testing.T) {
	for _, c := range []struct {
		key  string
		kind ExitKind
		says []string
	}{
		{"p", ExitPowerOff, nil},
		{"r", ExitReset, nil},
		{"k", ExitReset, nil},
		{"t", ExitReset, []string{"triple fault of vCPU 0"}},
		{"i", ExitCrash, []string{"KVM_EXIT_INTERNAL_ERROR, suberror 1: emulation failure", "RIP 0x100054 in ring 0, instruction bytes df 35 00 00 00 d0"}},
	} {
		t.Run(c.key, func(t *testing.T) {
			con := vmtest.NewTape()
			m := newMachine(t, 1, vmtest.Obey, con)
			check(t, m.Start(false))
			con.Await(t, "B")
			con.Type("x")
			con.Await(t, "Bx")
			con.Type(c.key)
			exit := wait(t, m)
			if exit.Kind != c.kind {
				t.Fatalf("the guest %v (%v)", exit.Kind, exit.Err)
			}
			if (exit.Err != nil) != (c.says != nil) {
				t.Fatalf("error %v", exit.Err)
			}
			for _, s := range c.says {
				if !strings.Contains(exit.Err.Error(), s) {
					t.Errorf("error %q does not say %q", exit.Err, s)
				}
			}
			if exit.Err != nil {
				t.Log(exit.Err)
				if strings.Contains(exit.Err.Error(), "0xfff0") {
					t.Error("the guest was not at the reset vector")
				}
			}
			ended := (*EndedError)(nil)
			for name, err := range map[string]error{"Pause": m.Pause(t.Context()), "Resume": m.Resume(), "Start": m.Start(true)} {
				if !errors.As(err, &ended) || ended.Exit.Kind != c.kind {
					t.Errorf("%s after the end: %v", name, err)
				}
			}
		})
	}
}

// TestJumpIntoNothing: an instruction fetch where there is no RAM.
func TestJumpIntoNothing(t *testing.T) {
	m := newMachine(t, 1, []byte{0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0}, nil) // mov $0xd0000000,%eax; jmp *%eax
	check(t, m.Start(false))
	exit := wait(t, m)
	if exit.Kind != ExitCrash || !strings.Contains(exit.Err.Error(), "RIP 0xd0000000, where no RAM is mapped") {
		t.Fatalf("the guest %v: %v", exit.Kind, exit.Err)
	}
	t.Log(exit.Err)
}

func TestExplainEmulation(t *testing.T) {
	kernel := place{known: true, rip: 0x1000}
	user := place{known: true, rip: 0x1000, ring: 3}
	for _, c := range []struct {
		at       place
		code     []byte
		software bool
		says     string
	}{
		{kernel, nil, true, "jumped to an address that is not RAM"},
		{kernel, []byte{0x9b}, true, "cannot emulate FWAIT; build the guest's kernel without it"},
		{kernel, []byte{0xcc}, true, "cannot emulate INT3"},
		{kernel, []byte{0x48, 0x0f, 0xae, 0x27}, true, "cannot emulate XSAVE;"},
		{kernel, []byte{0x0f, 0xae, 0x2f}, true, "cannot emulate XRSTOR"},
		{kernel, []byte{0xf0, 0x48, 0x0f, 0xc7, 0x0e}, true, "cannot emulate CMPXCHG16B"},
		{kernel, []byte{0x48, 0x0f, 0xc7, 0x0e}, true, "cannot emulate CMPXCHG16B"},
		{kernel, []byte{0xf3, 0x48, 0x0f, 0xb8, 0xc0}, true, "cannot emulate POPCNT"},
		{kernel, []byte{0x0f, 0xb8, 0xc0}, true, "cannot emulate this instruction"},
		{kernel, []byte{0x90}, false, "which it does for accesses to devices"},
		{kernel, []byte{0x9b}, false, "had to emulate the instruction, FWAIT, and cannot"},
		{user, []byte{0xdf, 0x30}, true, "which it does for accesses to devices"},
		{kernel, []byte{0x66}, true, "cannot emulate this instruction"},
	} {
		at := c.at
		at.code = c.code
		if got := explainEmulation(at, c.software); !strings.Contains(got, c.says) {
			t.Errorf("% x: %q does not say %q", c.code, got, c.says)
		}
	}
}
