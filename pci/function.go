package pci

import (
	"encoding/binary"
	"fmt"
	"sync"
)

const (
	configSize = 256

	regCommand     = 0x04
	regStatus      = 0x06
	regRevision    = 0x08
	regClass       = 0x09
	regCacheLine   = 0x0c
	regBAR         = 0x10
	regSubsystem   = 0x2c
	regCapPointer  = 0x34
	regIntrLine    = 0x3c
	capabilityArea = 0x40

	commandMemory    = 1 << 1
	commandMaster    = 1 << 2
	commandParity    = 1 << 6
	commandSERR      = 1 << 8
	commandNoINTx    = 1 << 10
	commandWritable  = commandMemory | commandMaster | commandParity | commandSERR | commandNoINTx
	statusCapability = 1 << 4
)

// Capability ids.
const (
	CapVendor = 0x09
	capMSIX   = 0x11
)

// Identity is a function's identity in its configuration space.
type Identity struct {
	Vendor, Device       uint16
	SubVendor, SubDevice uint16
	Class                uint32 // class, subclass, programming interface: 0xCCSSPP
	Revision             uint8
}

// Function is a PCI function: a type-0 configuration space, BARs and capabilities.
// Add BARs and capabilities before the function is put on a bus.
type Function struct {
	bus  *Bus
	bars [barCount]*bar
	caps []*capability
	msix *MSIX
	end  int // end of the capabilities
	last int // offset of the last capability's "next" byte

	space    sync.Mutex // guards config and the mapping of BARs
	config   [configSize]byte
	writable [configSize]byte // bits that the guest may change
}

// Capability is an entry of a function's capability list.
type Capability struct {
	ID byte
	// Data follows the capability's id and next pointer. Writable has the bits
	// of Data that the guest may change; nil: none.
	Data, Writable []byte
	// BeforeRead is called before the guest reads bytes [off, off+n) of data,
	// the guest's view of Data. It may change data.
	BeforeRead func(data []byte, off, n int)
	// AfterWrite is called after the guest has written bytes [off, off+n).
	AfterWrite func(data []byte, off, n int)
}

type capability struct {
	Capability
	at int // offset of the data in the configuration space
}

// NewFunction returns a function without BARs and capabilities.
func NewFunction(id Identity) *Function {
	f := &Function{end: capabilityArea, last: regCapPointer}
	c := f.config[:]
	binary.LittleEndian.PutUint16(c[0:], id.Vendor)
	binary.LittleEndian.PutUint16(c[2:], id.Device)
	c[regRevision] = id.Revision
	c[regClass], c[regClass+1], c[regClass+2] = byte(id.Class), byte(id.Class>>8), byte(id.Class>>16)
	binary.LittleEndian.PutUint16(c[regSubsystem:], id.SubVendor)
	binary.LittleEndian.PutUint16(c[regSubsystem+2:], id.SubDevice)
	binary.LittleEndian.PutUint16(f.writable[regCommand:], commandWritable)
	f.writable[regCacheLine] = 0xff
	f.writable[regIntrLine] = 0xff
	return f
}

// AddCapability appends a capability to the list.
func (f *Function) AddCapability(c Capability) error {
	if c.Writable != nil && len(c.Writable) != len(c.Data) {
		return fmt.Errorf("PCI capability %#x: expected a mask of %d bytes, got %d", c.ID, len(c.Data), len(c.Writable))
	}
	at := f.end
	if at+2+len(c.Data) > configSize {
		return fmt.Errorf("PCI capability %#x of %d bytes: the configuration space is full", c.ID, 2+len(c.Data))
	}
	f.config[at] = c.ID
	copy(f.config[at+2:], c.Data)
	copy(f.writable[at+2:], c.Writable)
	f.config[f.last] = byte(at)
	f.config[regStatus] |= statusCapability
	f.last, f.end = at+1, (at+2+len(c.Data)+3)&^3
	f.caps = append(f.caps, &capability{c, at + 2})
	return nil
}

// data is the capability's part of the configuration space.
func (f *Function) data(c *capability) []byte { return f.config[c.at : c.at+len(c.Data)] }

// overlap returns the part of an access [reg, reg+n) that is in the capability's
// data, as an offset in the data and a length.
func (c *capability) overlap(reg, n int) (off, length int) {
	first, end := max(reg, c.at), min(reg+n, c.at+len(c.Data))
	return first - c.at, end - first
}

func (f *Function) readConfig(reg int, p []byte) {
	f.space.Lock()
	defer f.space.Unlock()
	for _, c := range f.caps {
		if off, n := c.overlap(reg, len(p)); n > 0 && c.BeforeRead != nil {
			c.BeforeRead(f.data(c), off, n)
		}
	}
	copy(p, f.config[reg:])
}

func (f *Function) writeConfig(reg int, p []byte) {
	f.space.Lock()
	defer f.space.Unlock()
	for i, v := range p {
		mask := f.writable[reg+i]
		f.config[reg+i] = f.config[reg+i]&^mask | v&mask
	}
	if reg < regBAR+4*barCount && reg+len(p) > regCommand {
		f.decode()
	}
	for _, c := range f.caps {
		if off, n := c.overlap(reg, len(p)); n > 0 && c.AfterWrite != nil {
			c.AfterWrite(f.data(c), off, n)
		}
	}
}
