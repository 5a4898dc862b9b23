package virtiotest

import "encoding/binary"

// splitDriver is the driver's side of virtio 1.2, section 2.7.
type splitDriver struct {
	*Driver
	desc, avail, usedRing []byte
	free                  []uint16 // descriptors
	chains                map[uint16][]uint16
	next                  uint16 // available index
	last                  uint16 // used index seen
	kicked                uint16 // available index at the last wantsKick
	interrupts            bool
}

func newSplitDriver(d *Driver) *splitDriver {
	n := uint64(d.state.Size)
	s := &splitDriver{Driver: d, chains: map[uint16][]uint16{}, interrupts: true}
	s.desc = d.Bytes(d.state.Desc, n*16)
	s.avail = d.Bytes(d.state.Driver, page(6+2*n))
	s.usedRing = d.Bytes(d.state.Device, page(6+8*n))
	for i := range d.state.Size {
		s.free = append(s.free, i)
	}
	return s
}

func (s *splitDriver) add(readable, writable []Buffer) (uint16, bool) {
	n := len(readable) + len(writable)
	if s.Indirect {
		n = 1
	}
	if n == 0 || n > len(s.free) {
		return 0, false
	}
	ids := append([]uint16(nil), s.free[:n]...)
	s.free = s.free[n:]
	head := ids[0]
	s.chains[head] = ids
	if s.Indirect {
		gpa, length := s.fillTable(int(head), readable, writable, true)
		putDesc(s.desc, int(head), gpa, length, 4, 0)
	} else {
		for i, id := range ids {
			buf, flags, next := Buffer{}, uint16(0), uint16(0)
			if i < len(readable) {
				buf = readable[i]
			} else {
				buf, flags = writable[i-len(readable)], 2
			}
			if i < n-1 {
				flags, next = flags|1, ids[i+1]
			}
			putDesc(s.desc, int(id), buf.GPA, buf.Len, flags, next)
		}
	}
	binary.LittleEndian.PutUint16(s.avail[4+2*(int(s.next)%int(s.state.Size)):], head)
	s.next++
	store16(s.avail, 2, s.next)
	return head, true
}

func (s *splitDriver) used() (Used, bool) {
	if load16(s.usedRing, 2) == s.last {
		return Used{}, false
	}
	b := s.usedRing[4+8*(int(s.last)%int(s.state.Size)):]
	u := Used{uint16(binary.LittleEndian.Uint32(b)), binary.LittleEndian.Uint32(b[4:])}
	s.last++
	s.free = append(s.free, s.chains[u.Token]...)
	delete(s.chains, u.Token)
	if s.interrupts {
		s.setInterrupts(true)
	}
	return u, true
}

func (s *splitDriver) wantsKick() bool {
	old := s.kicked
	s.kicked = s.next
	if !s.eventIdx() {
		return load16(s.usedRing, 0)&1 == 0 && old != s.next
	}
	event := load16(s.usedRing, 4+8*int(s.state.Size))
	return s.next-event-1 < s.next-old
}

func (s *splitDriver) setInterrupts(on bool) {
	s.interrupts = on
	if s.eventIdx() {
		event := s.last
		if !on {
			event-- // reached after 65535 more
		}
		store16(s.avail, 4+2*int(s.state.Size), event)
		return
	}
	flags := uint16(1)
	if on {
		flags = 0
	}
	store16(s.avail, 0, flags)
}
