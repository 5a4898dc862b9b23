package virtio

import (
	"encoding/binary"
	"fmt"
)

// split is a queue with the split layout, section 2.7: a descriptor table, the
// driver's available ring, and the device's used ring.
type split Queue

const (
	availNoInterrupt = 1 // VIRTQ_AVAIL_F_NO_INTERRUPT
	usedNoNotify     = 1 // VIRTQ_USED_F_NO_NOTIFY

	ringHeader   = 4 // flags, idx
	availElement = 2
	usedElement  = 8 // id, len
	eventSize    = 2 // used_event behind the available ring, avail_event behind the used
)

func (q *split) attach() error {
	n := uint64(q.s.Size)
	if n&(n-1) != 0 {
		return fmt.Errorf("%d descriptors are not a power of 2", n)
	}
	event := uint64(0)
	if q.eventIdx {
		event = eventSize
	}
	return (*Queue)(q).slice(n*descSize, 2, ringHeader+n*availElement+event, 4, ringHeader+n*usedElement+event)
}

// slice finds the three parts of the ring in guest memory. The alignments are
// those of sections 2.7 and 2.8.10.1, the descriptors' is 16.
func (q *Queue) slice(desc, availAlign, avail, usedAlign, used uint64) error {
	for _, part := range []struct {
		name       string
		gpa, align uint64
		size       uint64
		dst        *[]byte
	}{
		{"descriptors", q.s.Desc, descSize, desc, &q.desc},
		{"driver area", q.s.Driver, availAlign, avail, &q.avail},
		{"device area", q.s.Device, usedAlign, used, &q.used},
	} {
		if part.gpa%part.align != 0 {
			return fmt.Errorf("%s at gpa %#x: not a multiple of %d", part.name, part.gpa, part.align)
		}
		b, err := q.mem.Slice(part.gpa, part.size)
		if err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		*part.dst = b
	}
	return nil
}

func (q *split) mask() uint16 { return q.s.Size - 1 }

func (q *split) next(c *Chain) (bool, error) {
	waiting := load16(q.avail, 2) - q.s.NextAvail
	if waiting == 0 {
		return false, nil
	}
	if waiting > q.s.Size {
		return false, fmt.Errorf("the available index went on by %d in a queue of %d descriptors", waiting, q.s.Size)
	}
	at := ringHeader + int(q.s.NextAvail&q.mask())*availElement
	head := binary.LittleEndian.Uint16(q.avail[at:])
	if err := q.walk(c, head); err != nil {
		return false, err
	}
	c.id, c.descs = head, 1
	q.s.NextAvail++
	if !q.eventIdx && q.kicksOn {
		return true, q.setFlags(usedNoNotify)
	}
	return true, nil
}

// walk collects the chain that begins at head. A chain that is a loop exceeds
// the limit.
func (q *split) walk(c *Chain, head uint16) error {
	limit := min(int(q.s.Size), MaxChain)
	for i, n := head, 0; ; n++ {
		if i >= q.s.Size {
			return fmt.Errorf("descriptor %d of %d", i, q.s.Size)
		}
		if n == limit {
			return fmt.Errorf("a chain of more than %d descriptors", limit)
		}
		d := readDesc(q.desc, int(i))
		if d.lo&descIndirect != 0 {
			// It may be the last of a chain (2.7.5.3.2). Its write flag is ignored.
			if !q.indirect {
				return fmt.Errorf("descriptor %d is indirect, which was not negotiated", i)
			}
			if d.lo&descNext != 0 {
				return fmt.Errorf("descriptor %d is indirect and has a next", i)
			}
			return q.walkTable(c, d, n)
		}
		if err := c.add(q.mem, d.addr, d.len, d.lo&descWrite != 0); err != nil {
			return err
		}
		if d.lo&descNext == 0 {
			return nil
		}
		i = d.hi
	}
}

// walkTable collects the chain in an indirect table, after n descriptors outside
// of it.
func (q *split) walkTable(c *Chain, table desc, n int) error {
	b, entries, err := (*Queue)(q).table(table)
	if err != nil {
		return err
	}
	for i := uint16(0); ; n++ {
		if int(i) >= entries {
			return fmt.Errorf("descriptor %d of an indirect table of %d", i, entries)
		}
		if n == MaxChain {
			return fmt.Errorf("a chain of more than %d descriptors", MaxChain)
		}
		d := readDesc(b, int(i))
		if d.lo&descIndirect != 0 {
			return fmt.Errorf("descriptor %d of an indirect table is indirect", i)
		}
		if err := c.add(q.mem, d.addr, d.len, d.lo&descWrite != 0); err != nil {
			return err
		}
		if d.lo&descNext == 0 {
			return nil
		}
		i = d.hi
	}
}

// table returns an indirect table and its number of descriptors, at least 1.
func (q *Queue) table(d desc) ([]byte, int, error) {
	if d.len == 0 || d.len%descSize != 0 {
		return nil, 0, fmt.Errorf("an indirect table of %d bytes", d.len)
	}
	b, err := q.mem.Slice(d.addr, uint64(d.len))
	if err != nil {
		return nil, 0, fmt.Errorf("indirect table: %w", err)
	}
	return b, len(b) / descSize, nil
}

func (q *split) rewind(*Chain) { q.s.NextAvail-- }

func (q *split) publish(chains []Chain, written []uint32) error {
	for i := range chains {
		at := ringHeader + int((q.s.NextUsed+uint16(i))&q.mask())*usedElement
		binary.LittleEndian.PutUint32(q.used[at:], uint32(chains[i].id))
		binary.LittleEndian.PutUint32(q.used[at+4:], written[i])
		if err := q.mem.MarkDirty(q.s.Device+uint64(at), usedElement); err != nil {
			return err
		}
	}
	q.s.NextUsed += uint16(len(chains))
	q.s.Unsignalled = min(q.s.Unsignalled+uint32(len(chains)), MaxQueueSize)
	return q.setFlags(binary.LittleEndian.Uint16(q.used) & usedNoNotify)
}

// setFlags stores the used ring's flags and index, which are one 4-byte word.
func (q *split) setFlags(flags uint16) error {
	store32(q.used, 0, uint32(flags)|uint32(q.s.NextUsed)<<16)
	return q.mem.MarkDirty(q.s.Device, ringHeader)
}

func (q *split) interrupts() bool {
	if !q.eventIdx {
		return binary.LittleEndian.Uint16(q.avail)&availNoInterrupt == 0
	}
	if q.s.Unsignalled >= MaxQueueSize {
		return true
	}
	// 2.7.7.2: the driver asks if the element at index used_event is new.
	event := load16(q.avail, ringHeader+int(q.s.Size)*availElement)
	return q.s.NextUsed-event-1 < uint16(q.s.Unsignalled)
}

func (q *split) wantKicks() error {
	if !q.eventIdx {
		return q.setFlags(0)
	}
	at := ringHeader + int(q.s.Size)*usedElement
	binary.LittleEndian.PutUint16(q.used[at:], q.s.NextAvail)
	// The store in setFlags is the full barrier.
	if err := q.mem.MarkDirty(q.s.Device+uint64(at), eventSize); err != nil {
		return err
	}
	return q.setFlags(0)
}
