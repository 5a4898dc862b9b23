package blk

import (
	"encoding/binary"
)

// configBytes is the length of struct virtio_blk_config up to the last field in
// use (section 5.2.4).
const configBytes = 60

// Offsets in struct virtio_blk_config.
const (
	offCapacity     = 0
	offSegMax       = 12
	offCylinders    = 16
	offHeads        = 18
	offSectors      = 19
	offBlockSize    = 20
	offPhysicalExp  = 24
	offMinIO        = 26
	offOptIO        = 28
	offWriteback    = 32
	offQueues       = 34
	offDiscardMax   = 36
	offDiscardCount = 40
	offDiscardAlign = 44
	offZeroMax      = 48
	offZeroCount    = 52
	offZeroUnmap    = 56
)

// The geometry that BIOSes assume for disks with logical block addresses.
const (
	heads           = 16
	sectorsPerTrack = 63
	maxCylinders    = 1<<16 - 1
)

// ReadConfig implements [virtio.Device].
func (d *Device) ReadConfig(off uint32, p []byte) {
	d.shownMu.Lock()
	t, writeBack := d.topology, d.writeBack
	d.shownMu.Unlock()
	le := binary.LittleEndian
	var b [configBytes]byte
	le.PutUint64(b[offCapacity:], d.image.sectors)
	le.PutUint32(b[offSegMax:], maxSegments)
	le.PutUint16(b[offCylinders:], uint16(min(d.image.sectors/(heads*sectorsPerTrack), maxCylinders)))
	b[offHeads], b[offSectors] = heads, sectorsPerTrack
	le.PutUint32(b[offBlockSize:], t.BlockSize)
	b[offPhysicalExp] = t.PhysicalExp
	le.PutUint16(b[offMinIO:], t.MinIO)
	le.PutUint32(b[offOptIO:], t.OptIO)
	le.PutUint16(b[offQueues:], uint16(d.config.queues()))
	if !d.config.ReadOnly {
		if writeBack {
			b[offWriteback] = 1
		}
		le.PutUint32(b[offDiscardMax:], maxDiscardSectors)
		le.PutUint32(b[offDiscardCount:], maxDiscardRanges)
		le.PutUint32(b[offDiscardAlign:], t.DiscardAlign)
		le.PutUint32(b[offZeroMax:], maxZeroSectors)
		le.PutUint32(b[offZeroCount:], maxZeroRanges)
		b[offZeroUnmap] = 1
	}
	if off < configBytes {
		copy(p, b[off:])
	}
}

// WriteConfig implements [virtio.Device]. The writeback field is the only one
// that a driver may write (5.2.5.2).
func (d *Device) WriteConfig(off uint32, p []byte) {
	if off > offWriteback || uint64(off)+uint64(len(p)) <= offWriteback || d.config.ReadOnly {
		return
	}
	d.shownMu.Lock()
	defer d.shownMu.Unlock()
	d.writeBack = p[offWriteback-off]&1 != 0
}

// caches reports whether writes may become durable only with a flush (5.2.6.2).
// The writeback field decides if the driver has negotiated it; otherwise they
// may, if the driver has negotiated flushes.
func (d *Device) caches() bool {
	if d.features&FeatureConfigWCE != 0 {
		d.shownMu.Lock()
		defer d.shownMu.Unlock()
		return d.writeBack
	}
	return d.features&FeatureFlush != 0
}
