package virtio

import "fmt"

// Segment is the guest memory that one descriptor describes.
type Segment struct {
	GPA uint64
	Buf []byte // the memory itself
}

// Chain is a request of the driver: the buffers that the device reads, then
// those that it writes. [Queue.Next] fills a Chain and reuses its slices.
//
// Segments are guest memory, which the guest may change at any time, so a
// device copies a value before it checks it. Descriptors of length 0 have no
// segment.
type Chain struct {
	Readable []Segment
	Writable []Segment

	queue    *Queue // nil when the chain is not out
	readable uint64 // bytes
	writable uint64 // bytes
	epoch    uint64 // the queue's, when it handed the chain out
	seq      uint64 // counts the chains that are taken
	id       uint16 // head (split) or buffer id (packed)
	descs    uint16 // descriptors that the chain takes up in the ring
}

// ReadableLen is the number of bytes that the device may read; below 4 GiB.
func (c *Chain) ReadableLen() int { return int(c.readable) }

// WritableLen is the number of bytes that the device may write; below 4 GiB.
func (c *Chain) WritableLen() int { return int(c.writable) }

// ReadAt copies from the readable bytes, as if they were contiguous, starting at
// off. It returns how many it copied: fewer than len(p) at the end.
func (c *Chain) ReadAt(p []byte, off int) int {
	done := 0
	for i := range c.Readable {
		b := c.Readable[i].Buf
		if off >= len(b) {
			off -= len(b)
			continue
		}
		done += copy(p[done:], b[off:])
		if off = 0; done == len(p) {
			break
		}
	}
	return done
}

// WriteAt copies to the writable bytes, as if they were contiguous, starting at
// off, and marks them dirty. It returns how many it copied: fewer than len(p) at
// the end.
func (c *Chain) WriteAt(p []byte, off int) int {
	done := 0
	for i := range c.Writable {
		s := &c.Writable[i]
		if off >= len(s.Buf) {
			off -= len(s.Buf)
			continue
		}
		n := copy(s.Buf[off:], p[done:])
		// The segment is RAM (Memory.Slice), so MarkDirty does not fail.
		_ = c.queue.mem.MarkDirty(s.GPA+uint64(off), uint64(n))
		done += n
		if off = 0; done == len(p) {
			break
		}
	}
	return done
}

// markWritten marks the first n of the writable bytes.
func (c *Chain) markWritten(mem Memory, n uint64) error {
	for i := range c.Writable {
		if n == 0 {
			break
		}
		s := &c.Writable[i]
		m := min(n, uint64(len(s.Buf)))
		if err := mem.MarkDirty(s.GPA, m); err != nil {
			return err
		}
		n -= m
	}
	return nil
}

// reset empties the chain for a request of q.
func (c *Chain) reset() {
	c.Readable, c.Writable = c.Readable[:0], c.Writable[:0]
	c.readable, c.writable = 0, 0
	c.queue = nil
}

// shrink frees the slices of a chain that had many segments: a device that keeps chains
// would hold the longest one in each of its places.
func (c *Chain) shrink() {
	const few = 16
	if cap(c.Readable)+cap(c.Writable) > few {
		c.Readable, c.Writable = nil, nil
	}
}

// add appends a descriptor's buffer. Readable buffers come first (2.7.4.2), and
// all together are shorter than 4 GiB: the used ring has 32 bits for a length.
func (c *Chain) add(mem Memory, addr uint64, n uint32, write bool) error {
	if !write && len(c.Writable) > 0 {
		return fmt.Errorf("a readable buffer at gpa %#x after a writable one", addr)
	}
	if n == 0 {
		return nil
	}
	if c.readable+c.writable+uint64(n) > 1<<32-1 {
		return fmt.Errorf("a chain of 4 GiB or more")
	}
	buf, err := mem.Slice(addr, uint64(n))
	if err != nil {
		return err
	}
	if write {
		c.Writable = append(c.Writable, Segment{addr, buf})
		c.writable += uint64(n)
	} else {
		c.Readable = append(c.Readable, Segment{addr, buf})
		c.readable += uint64(n)
	}
	return nil
}
