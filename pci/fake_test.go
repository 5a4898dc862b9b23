package pci_test

import (
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/pci"
)

var check = testenv.Check

// controller stands for a machine's interrupt controllers; it counts messages.
type controller struct {
	fail    error
	arrived map[uint32]uint64 // count of each message's data
}

func newController(testing.TB) *controller { return &controller{arrived: map[uint32]uint64{}} }

func (c *controller) SignalMSI(_ uint64, data uint32) error {
	if c.fail == nil {
		c.arrived[data]++
	}
	return c.fail
}

// take returns how many messages with that data arrived.
func (c *controller) take(data uint32) uint64 {
	n := c.arrived[data]
	delete(c.arrived, data)
	return n
}

// guest accesses a bus like a vCPU.
type guest struct {
	t   testing.TB
	bus *pci.Bus
}

func (g guest) config(slot, reg, n int) uint32 {
	g.t.Helper()
	var a, b [4]byte
	g.bus.ECAM().Read(uint64(slot<<15|reg), a[:n])
	var addr [4]byte
	binary.LittleEndian.PutUint32(addr[:], uint32(1<<31|slot<<11|reg&0xfc))
	p := g.bus.Ports(nil)
	p.Write(0, addr[:])
	p.Read(uint64(4+reg&3), b[:n])
	if a != b {
		g.t.Fatalf("slot %d register %#x: % x by ECAM, % x by ports", slot, reg, a[:n], b[:n])
	}
	return binary.LittleEndian.Uint32(a[:])
}

func (g guest) setConfig(slot, reg, n int, v uint32) {
	p := binary.LittleEndian.AppendUint32(nil, v)[:n]
	g.bus.ECAM().Write(uint64(slot<<15|reg), p)
}

func (g guest) read(addr uint64, n int) uint64 {
	var p [8]byte
	g.bus.MMIO().Read(addr-pci.MMIOBase, p[:n])
	return binary.LittleEndian.Uint64(p[:])
}

func (g guest) write(addr uint64, n int, v uint64) {
	p := binary.LittleEndian.AppendUint64(nil, v)
	g.bus.MMIO().Write(addr-pci.MMIOBase, p[:n])
}

// scratch is a BAR's registers: memory.
type scratch struct {
	bytes []byte
	moves []string
}

func (s *scratch) Read(off uint64, p []byte)  { copy(p, s.bytes[off:]) }
func (s *scratch) Write(off uint64, p []byte) { copy(s.bytes[off:], p) }
func (s *scratch) moved(base uint64, there bool) {
	s.moves = append(s.moves, fmt.Sprintf("%#x %v", base, there))
}
