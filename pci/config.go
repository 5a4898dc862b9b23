package pci

import "encoding/binary"

// ECAM returns the memory-mapped configuration space, which starts at ECAMBase.
func (b *Bus) ECAM() Region { return ecam{b} }

type ecam struct{ *Bus }

func (e ecam) Read(off uint64, p []byte)  { e.readConfig(uint32(off>>12), off&0xfff, p) }
func (e ecam) Write(off uint64, p []byte) { e.writeConfig(uint32(off>>12), off&0xfff, p) }

// function returns function rid&7 of device rid>>3 on bus 0, or nil.
func (b *Bus) function(rid uint32) *Function {
	if rid>>8 != 0 || rid&7 != 0 {
		return nil
	}
	return b.functions[rid>>3&31]
}

func (b *Bus) readConfig(rid uint32, reg uint64, p []byte) {
	f := b.function(rid)
	if f == nil || reg+uint64(len(p)) > configSize {
		ones(p)
		return
	}
	f.readConfig(int(reg), p)
}

func (b *Bus) writeConfig(rid uint32, reg uint64, p []byte) {
	if f := b.function(rid); f != nil && reg+uint64(len(p)) <= configSize {
		f.writeConfig(int(reg), p)
	}
}

// Ports returns the 8 ports that start at ConfigPorts. The address register has
// only accesses of 4 bytes. Other accesses to its four ports go to rest, which may
// be nil, with the same offset: a PC has its reset control at port 0xcf9.
func (b *Bus) Ports(rest Region) Region { return ports{b, rest} }

type ports struct {
	*Bus
	rest Region
}

const (
	addressEnable = 1 << 31
	addressMask   = addressEnable | 0xfffffc
)

func (q ports) Read(off uint64, p []byte) {
	switch {
	case off >= 4:
		if rid, reg, ok := q.selected(off); ok && off+uint64(len(p)) <= ConfigPortCount {
			q.readConfig(rid, reg, p)
			return
		}
		ones(p)
	case off == 0 && len(p) == 4:
		binary.LittleEndian.PutUint32(p, q.address.Load())
	case q.rest != nil:
		q.rest.Read(off, p)
	default:
		ones(p)
	}
}

func (q ports) Write(off uint64, p []byte) {
	switch {
	case off >= 4:
		if rid, reg, ok := q.selected(off); ok && off+uint64(len(p)) <= ConfigPortCount {
			q.writeConfig(rid, reg, p)
		}
	case off == 0 && len(p) == 4:
		q.address.Store(binary.LittleEndian.Uint32(p) & addressMask)
	case q.rest != nil:
		q.rest.Write(off, p)
	}
}

// selected returns the register that the data port at off, 4 to 7, accesses.
func (q ports) selected(off uint64) (rid uint32, reg uint64, ok bool) {
	a := q.address.Load()
	return a >> 8 & 0xffff, uint64(a&0xfc) + off - 4, a&addressEnable != 0
}
