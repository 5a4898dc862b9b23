package acpi

import (
	"bytes"
	"encoding/binary"
	"os/exec"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
)

// The DSDT gives the address of the ID, in memory that no table reaches.
func TestGeneration(t *testing.T) {
	g := Generation{1, 2, 3}
	table := g.Table()
	if table.GPA+uint64(len(table.Data)) > 0xf0000 || GenerationID%8 != 0 || !bytes.Equal(table.Data[GenerationID-table.GPA:], g[:]) {
		t.Errorf("%+v", table)
	}
	if got, ok := ParseGeneration(table.Data); !ok || got != g {
		t.Errorf("%v, %v", got, ok)
	}
	for _, b := range [][]byte{nil, make([]byte, GenerationSize), table.Data[:GenerationSize-1]} {
		if _, ok := ParseGeneration(b); ok {
			t.Errorf("% x is an ID", b)
		}
	}
	address := append([]byte{0x0c}, binary.LittleEndian.AppendUint32(nil, GenerationID)...) // a DWordConst of AML
	if n := bytes.Count(dsdtAML, address); n != 1 {
		t.Errorf("the DSDT has the address %d times", n)
	}
}

// ACPICA, the interpreter of Linux, finds the device by the name that its driver looks for
// and the address of the ID, and the event's method notifies the device.
func TestGenerationByACPICA(t *testing.T) {
	testenv.NeedTools(t, "acpiexec")
	out, err := exec.Command("acpiexec", "-b", `evaluate \_SB.VGEN._CID; evaluate \_SB.VGEN.ADDR; evaluate \_GPE._E00`, "dsdt.aml").CombinedOutput()
	if err != nil {
		t.Fatalf("acpiexec: %v\n%s", err, out)
	}
	for _, want := range []string{`"VM_GEN_COUNTER"`, "[Integer] = 00000000000EF010\n    [Integer] = 0000000000000000", "Received a Device Notify on [VGEN]", "Value 0x80"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("acpiexec does not say %q:\n%s", want, out)
		}
	}
}
