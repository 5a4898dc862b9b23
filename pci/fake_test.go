package pci_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/pci"
	"golang.org/x/sys/unix"
)

var check = testenv.Check

// controller stands for a machine's interrupt controllers; it counts messages.
type controller struct {
	t       testing.TB
	routes  map[uint32]pci.MSIRoute
	fds     map[uint32]int
	used    map[uint32]bool
	batches int
	fail    error
	arrived map[uint32]uint64 // count of each message's data
}

func newController(t testing.TB) *controller {
	return &controller{t: t, routes: map[uint32]pci.MSIRoute{}, fds: map[uint32]int{}, used: map[uint32]bool{}, arrived: map[uint32]uint64{}}
}

func (c *controller) AllocateGSI() (uint32, error) {
	for gsi := uint32(24); gsi < 4096; gsi++ {
		if !c.used[gsi] {
			c.used[gsi] = true
			return gsi, nil
		}
	}
	return 0, errors.New("no GSI is free")
}

func (c *controller) FreeGSI(gsi uint32) {
	if !c.used[gsi] {
		c.t.Errorf("GSI %d freed twice", gsi)
	}
	delete(c.used, gsi)
	delete(c.routes, gsi)
}

func (c *controller) SetMSIRoutes(routes []pci.MSIRoute) error {
	if c.fail != nil {
		return c.fail
	}
	c.collect()
	c.batches++
	for _, r := range routes {
		if !c.used[r.GSI] {
			return fmt.Errorf("GSI %d was not allocated", r.GSI)
		}
		c.routes[r.GSI] = r
	}
	return nil
}

func (c *controller) AssignIRQFD(gsi uint32, fd int) error {
	if _, on := c.fds[gsi]; on {
		return fmt.Errorf("GSI %d has an irqfd", gsi)
	}
	c.fds[gsi] = fd
	return nil
}

func (c *controller) DeassignIRQFD(gsi uint32, fd int) error {
	if c.fds[gsi] != fd {
		return fmt.Errorf("GSI %d has no irqfd %d", gsi, fd)
	}
	c.collect()
	delete(c.fds, gsi)
	return nil
}

// collect reads the eventfds, which the kernel does immediately.
func (c *controller) collect() {
	for gsi, fd := range c.fds {
		var count [8]byte
		if _, err := unix.Read(fd, count[:]); err == nil {
			c.arrived[c.routes[gsi].Data] += binary.NativeEndian.Uint64(count[:])
		}
	}
}

// take returns how many messages with that data arrived.
func (c *controller) take(data uint32) uint64 {
	c.collect()
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
