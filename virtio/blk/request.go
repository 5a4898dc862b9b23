package blk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/govmm/govmm/internal/latency"
	"github.com/govmm/govmm/virtio"
)

// Requests, section 5.2.6. A request is a header that the device reads, data,
// and a status, the last byte that the device writes. Descriptors may divide them
// in any way (2.7.4).
const (
	typeIn          = 0
	typeOut         = 1
	typeFlush       = 4
	typeGetID       = 8
	typeDiscard     = 11
	typeWriteZeroes = 13

	statusOK          = 0
	statusIOErr       = 1
	statusUnsupported = 2

	headerSize = 16 // type, reserved, sector
	rangeSize  = 16 // sector, number of sectors, flags
	flagUnmap  = 1
)

// Limits of one discard or write-zeroes request. The limit for zeros is smaller:
// they may have to be written, and a pause waits for the writes.
const (
	maxDiscardSectors = 2 << 30 / SectorSize
	maxDiscardRanges  = 16
	maxZeroSectors    = 16 << 20 / SectorSize
	maxZeroRanges     = 1
)

const (
	// maxTransfer is how many bytes a request may read or write. Drivers use
	// requests of a few MiB at most, and a pause waits for the requests under
	// way.
	maxTransfer = 16 << 20
	// discardStep is how much is discarded between two checks for a pause.
	discardStep = 256 << 20
)

// worker carries out requests of a queue, one at a time.
type worker struct {
	d       *Device
	loop    *virtio.Loop
	bufs    [][]byte
	scratch scratch
}

// errRequest is a request without a header, or without room for its status.
var errRequest = errors.New("block request")

// Stats counts the requests of a disk since it was opened.
type Stats struct {
	ReadBytes, WrittenBytes      uint64
	Reads, Writes, Flushes, Rest uint64           // requests
	Errors                       uint64           // of the host's storage
	Latency                      latency.Snapshot // of requests, from when they are fetched until storage has answered
}

type counters struct {
	readBytes, writtenBytes      atomic.Uint64
	reads, writes, flushes, rest atomic.Uint64
	errors                       atomic.Uint64
	latency                      latency.Counter
}

// Stats returns the counters.
func (d *Device) Stats() Stats {
	c := &d.counters
	return Stats{
		ReadBytes: c.readBytes.Load(), WrittenBytes: c.writtenBytes.Load(),
		Reads: c.reads.Load(), Writes: c.writes.Load(), Flushes: c.flushes.Load(), Rest: c.rest.Load(),
		Errors: c.errors.Load(), Latency: c.latency.Snapshot(),
	}
}

// serve carries out a request and stores its status. It returns how many bytes
// have been written to the front of the writable part. An error means that the
// driver broke a rule.
func (w *worker) serve(c *virtio.Chain) (uint32, error) {
	var header [headerSize]byte
	if n := c.ReadAt(header[:], 0); n < headerSize {
		return 0, fmt.Errorf("%w: expected a header of %d bytes, got %d", errRequest, headerSize, n)
	}
	room := c.WritableLen() - 1 // of data
	if room < 0 {
		return 0, fmt.Errorf("%w: no room for the status", errRequest)
	}
	status, filled := byte(statusUnsupported), 0
	sector := binary.LittleEndian.Uint64(header[8:])
	kind := binary.LittleEndian.Uint32(header[:])
	w.count(kind, c, room)
	begun := time.Now()
	switch kind {
	case typeIn:
		status, filled = w.in(c, sector, room)
	case typeOut:
		status = w.out(c, sector)
	case typeFlush:
		status = w.flush()
	case typeGetID:
		status, filled = w.getID(c, room)
	case typeDiscard:
		status = w.ranges(c, maxDiscardRanges, maxDiscardSectors, 0, w.discard)
	case typeWriteZeroes:
		status = w.ranges(c, maxZeroRanges, maxZeroSectors, flagUnmap, w.writeZeroes)
	}
	w.d.counters.latency.Observe(time.Since(begun))
	c.WriteAt([]byte{status}, room)
	if filled == room {
		filled++
	}
	return uint32(filled), nil
}

// inside reports whether the n bytes that begin at a sector are whole sectors of
// the disk.
func (d *Device) inside(sector uint64, n uint64) bool {
	return n%SectorSize == 0 && sector <= d.image.sectors && n/SectorSize <= d.image.sectors-sector
}

// in reads. A read that fails may have changed a part of the buffers: all are
// cleared and count as written, so that they are marked dirty.
func (w *worker) in(c *virtio.Chain, sector uint64, room int) (byte, int) {
	if room > maxTransfer || !w.d.inside(sector, uint64(room)) {
		return statusIOErr, 0
	}
	w.collect(c.Writable, 0, room)
	off := int64(sector) * SectorSize
	if err := w.d.image.read(w.bufs, off, &w.scratch); err != nil {
		w.d.hostError("read", sector, int64(room), err)
		for _, b := range w.bufs {
			clear(b)
		}
		return statusIOErr, room
	}
	w.d.counters.reads.Add(1)
	w.d.counters.readBytes.Add(uint64(room))
	return statusOK, room
}

func (w *worker) out(c *virtio.Chain, sector uint64) byte {
	n := c.ReadableLen() - headerSize
	if w.d.config.ReadOnly || n > maxTransfer || !w.d.inside(sector, uint64(n)) {
		return statusIOErr
	}
	w.collect(c.Readable, headerSize, n)
	off := int64(sector) * SectorSize
	durable := !w.d.caches()
	err := w.d.image.write(w.bufs, off, durable, &w.scratch)
	w.d.changed(off, int64(n))
	if err == nil && durable {
		err = w.d.flushes.tell() // the driver does not flush
	}
	if err != nil {
		w.d.hostError("write", sector, int64(n), err)
		return statusIOErr
	}
	w.d.written.add(uint64(off) / sampleBlock)
	w.d.counters.writes.Add(1)
	w.d.counters.writtenBytes.Add(uint64(n))
	return statusOK
}

func (w *worker) flush() byte {
	if err := w.d.flush(true); err != nil {
		w.d.hostError("flush", 0, 0, err)
		return statusIOErr
	}
	w.d.counters.flushes.Add(1)
	return statusOK
}

func (w *worker) getID(c *virtio.Chain, room int) (byte, int) {
	var id [idBytes]byte
	copy(id[:], w.d.config.ID)
	n := c.WriteAt(id[:min(room, idBytes)], 0)
	w.d.counters.rest.Add(1)
	return statusOK, n
}

// span is a range of a discard or write-zeroes request.
type span struct {
	sector, sectors uint64
	unmap           bool
}

// ranges carries out a discard or write-zeroes request of at most most ranges. It
// checks all of them first; flags other than known are not supported (5.2.6.2).
func (w *worker) ranges(c *virtio.Chain, most int, mostSectors, known uint32, do func(span) error) byte {
	if w.d.config.ReadOnly {
		return statusIOErr
	}
	n := c.ReadableLen() - headerSize
	if n == 0 || n%rangeSize != 0 || n > most*rangeSize {
		return statusIOErr
	}
	var spans [maxDiscardRanges]span
	count := n / rangeSize
	for i := range count {
		var b [rangeSize]byte
		c.ReadAt(b[:], headerSize+i*rangeSize)
		s := &spans[i]
		s.sector = binary.LittleEndian.Uint64(b[:])
		sectors, flags := binary.LittleEndian.Uint32(b[8:]), binary.LittleEndian.Uint32(b[12:])
		if flags&^known != 0 {
			return statusUnsupported
		}
		s.sectors, s.unmap = uint64(sectors), flags&flagUnmap != 0
		if sectors > mostSectors || !w.d.inside(s.sector, s.sectors*SectorSize) {
			return statusIOErr
		}
	}
	for _, s := range spans[:count] {
		if s.sectors == 0 {
			continue
		}
		if err := do(s); err != nil {
			return statusIOErr
		}
	}
	w.d.counters.rest.Add(1)
	return statusOK
}

// discard discards until a pause is due. The rest stays: a discard is advice.
func (w *worker) discard(s span) error {
	off, end := int64(s.sector)*SectorSize, int64(s.sector+s.sectors)*SectorSize
	for off < end && !w.loop.Urgent() {
		n := min(end-off, discardStep)
		err := w.d.image.discard(off, n)
		w.d.changed(off, n)
		if err != nil {
			w.d.hostError("discard", uint64(off)/SectorSize, n, err)
			return err
		}
		off += n
	}
	return nil
}

func (w *worker) writeZeroes(s span) error {
	n := int64(s.sectors) * SectorSize
	w.d.limit.Spend(0, int(n))
	durable := !w.d.caches()
	err := w.d.image.zero(int64(s.sector)*SectorSize, n, s.unmap, durable, &w.scratch)
	w.d.changed(int64(s.sector)*SectorSize, n)
	if err == nil && durable {
		err = w.d.flushes.tell()
	}
	if err != nil {
		w.d.hostError("write of zeros", s.sector, n, err)
		return err
	}
	w.d.written.add(s.sector * SectorSize / sampleBlock)
	return nil
}

// collect sets w.bufs to n bytes of the segments, starting at off.
func (w *worker) collect(segments []virtio.Segment, off, n int) {
	w.bufs = w.bufs[:0]
	for i := range segments {
		b := segments[i].Buf
		if off >= len(b) {
			off -= len(b)
			continue
		}
		b = b[off:]
		b = b[:min(len(b), n)]
		if off, n = 0, n-len(b); len(b) > 0 {
			w.bufs = append(w.bufs, b)
		}
	}
}
