package virtio

import (
	"encoding/binary"
	"fmt"
)

// packed is a queue with the packed layout, section 2.8: a ring of descriptors
// that both sides write, and an event suppression structure for each side.
type packed Queue

// Event suppression, section 2.8.10: a place in the ring with its wrap counter,
// and flags.
const (
	eventsEnable  = 0
	eventsDisable = 1
	eventsDesc    = 2
	eventsMask    = 3

	eventPlace = 1<<15 - 1
	eventWrap  = 1 << 15
)

func (q *packed) attach() error {
	n := uint64(q.s.Size)
	if q.s.NextAvail >= q.s.Size || q.s.NextUsed >= q.s.Size {
		return fmt.Errorf("places %d and %d in a ring of %d descriptors", q.s.NextAvail, q.s.NextUsed, n)
	}
	return (*Queue)(q).slice(n*descSize, 4, 4, 4, 4)
}

// available reports whether flags, of the descriptor at NextAvail, say that the
// driver made it available in this round (2.8.1).
func (q *packed) available(flags uint16) bool {
	avail, used := flags&descAvail != 0, flags&descUsed != 0
	return avail != used && avail == !q.s.AvailFlipped
}

func (q *packed) next(c *Chain) (bool, error) {
	// The driver writes the flags of the first descriptor last, so they are
	// loaded first.
	first := load32(q.desc, int(q.s.NextAvail)*descSize+12)
	if !q.available(uint16(first >> 16)) {
		return false, nil
	}
	n, err := q.walk(c, first)
	if err != nil {
		return false, err
	}
	c.descs = n
	q.s.NextAvail, q.s.AvailFlipped = q.step(q.s.NextAvail, q.s.AvailFlipped, n)
	if q.kicksOn {
		return true, q.setEvents(eventsDisable)
	}
	return true, nil
}

// walk collects the chain at NextAvail and returns how many descriptors of the
// ring it has.
func (q *packed) walk(c *Chain, first uint32) (uint16, error) {
	limit := min(q.s.Size, MaxChain)
	i := q.s.NextAvail
	for n := uint16(1); ; n++ {
		d := readDesc(q.desc, int(i))
		if n == 1 {
			d.lo, d.hi = uint16(first), uint16(first>>16)
		}
		c.id = d.lo // the last descriptor's is the buffer's (2.8.6)
		if d.hi&descIndirect != 0 {
			// Only a single descriptor can be indirect (2.8.7).
			if n != 1 || d.hi&descNext != 0 {
				return 0, fmt.Errorf("descriptor %d is indirect and in a list of others", i)
			}
			if !q.indirect {
				return 0, fmt.Errorf("descriptor %d is indirect, which was not negotiated", i)
			}
			return 1, q.walkTable(c, d)
		}
		if err := c.add(q.mem, d.addr, d.len, d.hi&descWrite != 0); err != nil {
			return 0, err
		}
		if d.hi&descNext == 0 {
			return n, nil
		}
		if n == limit {
			return 0, fmt.Errorf("a chain of more than %d descriptors", limit)
		}
		if i++; i == q.s.Size {
			i = 0
		}
	}
}

// walkTable collects all of an indirect table in its order. The only flag with a
// meaning is "write" (2.8.7).
func (q *packed) walkTable(c *Chain, table desc) error {
	b, entries, err := (*Queue)(q).table(table)
	if err != nil {
		return err
	}
	if entries > MaxChain {
		return fmt.Errorf("a chain of more than %d descriptors", MaxChain)
	}
	for i := range entries {
		d := readDesc(b, i)
		if err := c.add(q.mem, d.addr, d.len, d.hi&descWrite != 0); err != nil {
			return err
		}
	}
	return nil
}

// step goes n descriptors on in the ring.
func (q *packed) step(at uint16, flipped bool, n uint16) (uint16, bool) {
	if next := uint32(at) + uint32(n); next < uint32(q.s.Size) {
		return uint16(next), flipped
	} else {
		return uint16(next - uint32(q.s.Size)), !flipped
	}
}

func (q *packed) rewind(c *Chain) {
	if c.descs <= q.s.NextAvail {
		q.s.NextAvail -= c.descs
		return
	}
	q.s.NextAvail += q.s.Size - c.descs
	q.s.AvailFlipped = !q.s.AvailFlipped
}

func (q *packed) publish(chains []Chain, written []uint32) error {
	first, firstWord := int(q.s.NextUsed), uint32(0)
	for i := range chains {
		at := int(q.s.NextUsed) * descSize
		flags := uint16(0)
		if !q.s.UsedFlipped {
			flags = descAvail | descUsed
		}
		if written[i] > 0 {
			flags |= descWrite
		}
		binary.LittleEndian.PutUint32(q.desc[at+8:], written[i])
		word := uint32(chains[i].id) | uint32(flags)<<16
		if i == 0 {
			firstWord = word // stored last: it publishes all
		} else {
			store32(q.desc, at+12, word)
		}
		if err := q.mem.MarkDirty(q.s.Desc+uint64(at), descSize); err != nil {
			return err
		}
		n := chains[i].descs
		q.s.NextUsed, q.s.UsedFlipped = q.step(q.s.NextUsed, q.s.UsedFlipped, n)
		q.s.Unsignalled = min(q.s.Unsignalled+uint32(n), MaxQueueSize)
	}
	store32(q.desc, first*descSize+12, firstWord)
	return q.mem.MarkDirty(q.s.Desc+uint64(first*descSize), descSize)
}

// position counts places over two rounds of the ring, which the wrap counter
// tells apart.
func (q *packed) position(at uint16, flipped bool) uint32 {
	if flipped {
		return uint32(at) + uint32(q.s.Size)
	}
	return uint32(at)
}

func (q *packed) interrupts() bool {
	// The full barrier before this load is the store of the used descriptor.
	word := load32(q.avail, 0)
	switch word >> 16 & eventsMask {
	case eventsEnable:
		return true
	case eventsDisable:
		return false
	}
	if !q.eventIdx {
		return true
	}
	size, place := uint32(q.s.Size), uint16(word&eventPlace)
	if place >= q.s.Size || q.s.Unsignalled >= size {
		return true
	}
	// 2.8.10.1: the driver asks if the descriptor at the place is new.
	event := q.position(place, word&eventWrap == 0)
	behind := q.position(q.s.NextUsed, q.s.UsedFlipped) + 2*size - event // in (0, 4 size)
	return (behind-1)%(2*size) < q.s.Unsignalled
}

func (q *packed) wantKicks() error {
	if !q.eventIdx {
		return q.setEvents(eventsEnable)
	}
	return q.setEvents(eventsDesc)
}

// setEvents stores the device's event suppression structure with a full barrier.
func (q *packed) setEvents(flags uint32) error {
	word := flags << 16
	if flags == eventsDesc {
		word |= uint32(q.s.NextAvail)
		if !q.s.AvailFlipped {
			word |= eventWrap
		}
	}
	store32(q.used, 0, word)
	return q.mem.MarkDirty(q.s.Device, 4)
}
