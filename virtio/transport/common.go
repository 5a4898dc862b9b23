package transport

import "encoding/binary"

// The common configuration structure, 4.1.4.3.
const (
	regDeviceSelect  = 0
	regDeviceFeature = 4
	regDriverSelect  = 8
	regDriverFeature = 12
	regConfigVector  = 16
	regNumQueues     = 18
	regStatus        = 20
	regGeneration    = 21
	regQueueSelect   = 22
	regQueueSize     = 24
	regQueueVector   = 26
	regQueueEnable   = 28
	regQueueNotify   = 30
	regQueueDesc     = 32
	regQueueDriver   = 40
	regQueueDevice   = 48
	regQueueReset    = 58
)

// readCommon builds the whole structure and copies a part of it. The structure
// is small, and drivers read it during setup only.
func (t *Transport) readCommon(off int, p []byte) {
	t.regs.Lock()
	defer t.regs.Unlock()
	var b [commonSize]byte
	le := binary.LittleEndian
	le.PutUint32(b[regDeviceSelect:], t.deviceSelect)
	if t.deviceSelect < 2 {
		le.PutUint32(b[regDeviceFeature:], uint32(t.offered>>(32*t.deviceSelect)))
	}
	le.PutUint32(b[regDriverSelect:], t.driverSelect)
	if t.driverSelect < 2 {
		le.PutUint32(b[regDriverFeature:], uint32(t.driverFeatures>>(32*t.driverSelect)))
	}
	le.PutUint16(b[regConfigVector:], uint16(t.configVector.Load()))
	le.PutUint16(b[regNumQueues:], uint16(len(t.queues)))
	b[regStatus] = byte(t.status.Load())
	b[regGeneration] = byte(t.generation.Load())
	le.PutUint16(b[regQueueSelect:], t.queueSelect)
	if q := t.selected(); q != nil {
		le.PutUint16(b[regQueueSize:], q.regs.Size)
		le.PutUint16(b[regQueueVector:], uint16(q.vector.Load()))
		if q.regs.Enabled {
			le.PutUint16(b[regQueueEnable:], 1)
		}
		le.PutUint16(b[regQueueNotify:], t.queueSelect)
		le.PutUint64(b[regQueueDesc:], q.regs.Desc)
		le.PutUint64(b[regQueueDriver:], q.regs.Driver)
		le.PutUint64(b[regQueueDevice:], q.regs.Device)
	}
	copy(p, b[off:])
}

// selected is the queue that queue_select names, or nil.
func (t *Transport) selected() *queue {
	if int(t.queueSelect) < len(t.queues) {
		return t.queues[t.queueSelect]
	}
	return nil
}

// writeCommon handles a write to one field, of the field's width (4.1.3.1), or
// of 8 bytes to two fields of 4. Other writes are ignored.
func (t *Transport) writeCommon(off int, p []byte) {
	t.regs.Lock()
	defer t.regs.Unlock()
	switch len(p) {
	case 1:
		if off == regStatus {
			t.writeStatus(p[0])
		}
	case 2:
		t.write16(off, binary.LittleEndian.Uint16(p))
	case 4:
		t.write32(off, binary.LittleEndian.Uint32(p))
	case 8:
		t.write32(off, binary.LittleEndian.Uint32(p))
		t.write32(off+4, binary.LittleEndian.Uint32(p[4:]))
	}
}

func (t *Transport) write16(off int, v uint16) {
	switch off {
	case regConfigVector:
		t.configVector.Store(t.vector(v))
		return
	case regQueueSelect:
		t.queueSelect = v
		return
	}
	q := t.selected()
	if q == nil {
		return
	}
	switch off {
	case regQueueVector:
		q.vector.Store(t.vector(v))
	case regQueueSize:
		// Queue.Start checks the size.
		if !q.regs.Enabled {
			q.regs.Size = v
		}
	case regQueueEnable:
		if v == 1 {
			t.enable(q)
		}
	case regQueueReset:
		if v == 1 {
			t.resetQueue(int(t.queueSelect))
		}
	}
}

// vector is what a vector register holds after a write of v: no vector if there
// is no vector v (4.1.5.1.2.1).
func (t *Transport) vector(v uint16) uint32 {
	if int(v) < t.msix.Vectors() {
		return uint32(v)
	}
	return noVector
}

func (t *Transport) write32(off int, v uint32) {
	switch off {
	case regDeviceSelect:
		t.deviceSelect = v
	case regDriverSelect:
		t.driverSelect = v
	case regDriverFeature:
		if t.driverSelect < 2 && t.status.Load()&statusFeaturesOK == 0 {
			shift := 32 * t.driverSelect
			t.driverFeatures = t.driverFeatures&^(0xffffffff<<shift) | uint64(v)<<shift
		}
	case regQueueDesc, regQueueDesc + 4, regQueueDriver, regQueueDriver + 4, regQueueDevice, regQueueDevice + 4:
		q := t.selected()
		if q == nil || q.regs.Enabled {
			return
		}
		field := [...]*uint64{&q.regs.Desc, &q.regs.Driver, &q.regs.Device}[(off-regQueueDesc)/8]
		if off%8 == 0 {
			*field = *field&^0xffffffff | uint64(v)
		} else {
			*field = *field&0xffffffff | uint64(v)<<32
		}
	}
}
