package acpi

import (
	"bytes"
	"encoding/binary"
	"testing"
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
