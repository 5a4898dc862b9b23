package acpi

import (
	"bytes"
	_ "embed"
	"encoding/binary"
	"fmt"
)

//go:generate make

//go:embed dsdt.aml
var dsdtAML []byte

// patchDSDT returns the DSDT with the machine's addresses. The fields of a resource
// are consecutive in AML: minimum, maximum, translation, length; or base and length
// (6.4.3). patchDSDT finds a resource by the range in dsdt.asl, which occurs only
// once.
func patchDSDT(cfg Config) ([]byte, error) {
	le := binary.LittleEndian
	words := func(v ...uint16) (b []byte) {
		for _, x := range v {
			b = le.AppendUint16(b, x)
		}
		return b
	}
	dwords := func(v ...uint64) (b []byte) {
		for _, x := range v {
			b = le.AppendUint32(b, uint32(x))
		}
		return b
	}
	mmio := cfg.MMIO
	t := bytes.Clone(dsdtAML)
	for _, p := range []struct {
		what     string
		old, new []byte
	}{
		{"configuration space", dwords(0x5a000000, 0xa50000), dwords(cfg.ECAM, uint64(cfg.Buses)<<20)},
		{"bus numbers", words(0, 0x5a, 0, 0x5b), words(0, uint16(cfg.Buses-1), 0, uint16(cfg.Buses))},
		{"window", dwords(0x5a500000, 0x5a5fffff, 0, 0x100000), dwords(mmio.Base, mmio.Base+mmio.Size-1, 0, mmio.Size)},
	} {
		if n := bytes.Count(dsdtAML, p.old); n != 1 {
			return nil, fmt.Errorf("DSDT: expected one place for the PCI %s, found %d (dsdt.asl and dsdt.go do not match)", p.what, n)
		}
		copy(t[bytes.Index(dsdtAML, p.old):], p.new)
	}
	sign(t)
	return t, nil
}
