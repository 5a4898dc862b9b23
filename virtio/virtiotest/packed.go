package virtiotest

import "encoding/binary"

// packedDriver is the driver's side of virtio 1.2, section 2.8.
type packedDriver struct {
	*Driver
	desc, events, deviceEvents []byte
	free                       []uint16 // buffer ids
	descs                      map[uint16]int
	room                       int
	next, last                 int // places in two rounds of the ring
	kicked                     int
	interrupts                 bool
}

func newPackedDriver(d *Driver) *packedDriver {
	p := &packedDriver{Driver: d, descs: map[uint16]int{}, room: int(d.state.Size), interrupts: true}
	p.desc = d.Bytes(d.state.Desc, uint64(d.state.Size)*16)
	p.events = d.Bytes(d.state.Driver, 4)
	p.deviceEvents = d.Bytes(d.state.Device, 4)
	for i := range d.state.Size {
		p.free = append(p.free, i)
	}
	return p
}

func (p *packedDriver) size() int { return int(p.state.Size) }

// flags are those of a descriptor made available at a place.
func (p *packedDriver) flags(place int) uint16 {
	if place < p.size() {
		return 1 << 7
	}
	return 1 << 15
}

func (p *packedDriver) add(readable, writable []Buffer) (uint16, bool) {
	n := len(readable) + len(writable)
	if p.Indirect {
		n = 1
	}
	if n == 0 || n > p.room {
		return 0, false
	}
	id := p.free[0]
	p.free = p.free[1:]
	p.descs[id] = n
	p.room -= n
	var first uint32
	for i := range n {
		place := (p.next + i) % (2 * p.size())
		buf, flags := Buffer{}, p.flags(place)
		switch {
		case p.Indirect:
			gpa, length := p.fillTable(int(id), readable, writable, false)
			buf, flags = Buffer{gpa, length}, flags|4
		case i < len(readable):
			buf = readable[i]
		default:
			buf, flags = writable[i-len(readable)], flags|2
		}
		if i < n-1 {
			flags |= 1
		}
		b := p.desc[place%p.size()*16:]
		binary.LittleEndian.PutUint64(b, buf.GPA)
		binary.LittleEndian.PutUint32(b[8:], buf.Len)
		// The id counts in the last one; others get one that is wrong.
		word := uint32(id) | uint32(flags)<<16
		if i < n-1 {
			word = word&^0xffff | 0xdead
		}
		if i == 0 {
			first = word
		} else {
			store(b, 12, word)
		}
	}
	store(p.desc, p.next%p.size()*16+12, first)
	p.next = (p.next + n) % (2 * p.size())
	return id, true
}

func (p *packedDriver) used() (Used, bool) {
	b := p.desc[p.last%p.size()*16:]
	word := load(b, 12)
	avail, used := word>>23&1 != 0, word>>31&1 != 0
	if avail != used || used != (p.last < p.size()) || p.room == p.size() {
		return Used{}, false
	}
	u := Used{uint16(word), binary.LittleEndian.Uint32(b[8:])}
	n, ok := p.descs[u.Token]
	if !ok {
		p.t.Fatalf("driver: used descriptor at place %d has id %#x, which is not in flight", p.last, u.Token)
	}
	if word>>17&1 == 0 {
		u.Len = 0 // 2.8.9: the length counts only with the write flag
	}
	delete(p.descs, u.Token)
	p.free = append(p.free, u.Token)
	p.room += n
	p.last = (p.last + n) % (2 * p.size())
	if p.interrupts {
		p.setInterrupts(true)
	}
	return u, true
}

// event encodes a place as in 2.8.10.
func (p *packedDriver) event(place int) uint32 {
	if place < p.size() {
		return uint32(place) | 1<<15
	}
	return uint32(place - p.size())
}

func (p *packedDriver) wantsKick() bool {
	old, added := p.kicked, (p.next-p.kicked+2*p.size())%(2*p.size())
	p.kicked = p.next
	word := load(p.deviceEvents, 0)
	switch word >> 16 & 3 {
	case 0:
		return added > 0
	case 1:
		return false
	}
	for i := range added {
		if p.event((old+i)%(2*p.size())) == word&0xffff {
			return true
		}
	}
	return false
}

func (p *packedDriver) setInterrupts(on bool) {
	p.interrupts = on
	switch {
	case !on:
		store(p.events, 0, 1<<16)
	case p.eventIdx():
		store(p.events, 0, 2<<16|p.event(p.last))
	default:
		store(p.events, 0, 0)
	}
}
