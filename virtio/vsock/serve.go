package vsock

import (
	"encoding/binary"
	"fmt"

	"github.com/govmm/govmm/virtio"
)

// serve moves what there is, and no more than a ring's worth of each queue.
// serving is held.
func (d *Device) serve() error {
	if err := d.tell(d.queues[eventQueue]); err != nil {
		return err
	}
	if err := d.transmit(d.queues[transmitQueue]); err != nil {
		return err
	}
	return d.receive(d.queues[receiveQueue])
}

// tell puts TRANSPORT_RESET into the event queue, if it is due and the driver
// has given a buffer for it (5.10.6.7).
func (d *Device) tell(q *virtio.Queue) error {
	if !d.lost {
		return nil
	}
	ok, err := q.Next(&d.chain)
	if err != nil || !ok {
		return err
	}
	if n := d.chain.WritableLen(); n < eventBytes {
		return fmt.Errorf("vsock: an event buffer of %d bytes", n)
	}
	var event [eventBytes]byte
	binary.LittleEndian.PutUint32(event[:], eventTransportReset)
	d.chain.WriteAt(event[:], 0)
	if err := q.Done(&d.chain, eventBytes); err != nil {
		return err
	}
	d.lost = false
	q.Notify()
	return nil
}

// transmit takes the guest's packets.
func (d *Device) transmit(q *virtio.Queue) error {
	defer q.Notify()
	for range queueSize {
		if d.stalled = len(d.resets) >= maxResets; d.stalled {
			return nil
		}
		ok, err := q.Next(&d.chain)
		if err != nil || !ok {
			return err
		}
		var b [headerBytes]byte
		if n := d.chain.ReadAt(b[:], 0); n < headerBytes {
			return fmt.Errorf("vsock: a packet of %d bytes, shorter than its header", n)
		}
		h := decodeHeader(&b)
		if room := d.chain.ReadableLen() - headerBytes; h.Op == opData && uint64(h.Len) > uint64(room) {
			return fmt.Errorf("vsock: a packet that says it has %d bytes, and has %d", h.Len, room)
		}
		d.handle(&h)
		if err := q.Done(&d.chain, 0); err != nil {
			return err
		}
	}
	q.Signal() // a driver may add packets for ever
	return nil
}

// handle acts on a packet of the guest, whose payload is in chain.
func (d *Device) handle(h *header) {
	if h.SrcCID != uint64(d.config.GuestCID()) {
		return // not from whom it says it is, so there is nobody to answer
	}
	if h.DstCID != hostCID || h.Type != typeStream {
		d.refuse(h)
		return
	}
	c := d.conns[ports{h.DstPort, h.SrcPort}]
	switch {
	case c != nil:
		c.handle(h)
	case h.Op == opRequest:
		d.dial(h)
	default:
		d.refuse(h)
	}
}

// refuse answers a packet that has no connection with RST, unless it is one.
func (d *Device) refuse(h *header) {
	if h.Op != opReset {
		d.sendReset(Reset{CID: h.DstCID, HostPort: h.DstPort, GuestPort: h.SrcPort, Type: h.Type})
	}
}

func (d *Device) sendReset(r Reset) {
	d.resets = append(d.resets, r)
	signal(d.wake)
}

// receive gives the guest what there is for it: refusals first, then a packet
// of each connection by turns.
func (d *Device) receive(q *virtio.Queue) error {
	defer q.Notify()
	for range queueSize {
		if len(d.resets) == 0 && !d.turn() {
			return nil
		}
		ok, err := q.Next(&d.chain)
		if err != nil || !ok {
			return err
		}
		// Room for less than a byte of data is of no use to either side.
		room := d.chain.WritableLen() - headerBytes
		if room < 1 {
			return fmt.Errorf("vsock: a receive buffer of %d bytes", room+headerBytes)
		}
		var h header
		var payload []byte
		var c *conn
		if len(d.resets) > 0 {
			h = d.resets[0].header()
			d.resets = d.resets[:copy(d.resets, d.resets[1:])]
			if d.stalled {
				d.stalled = false
				d.queues[transmitQueue].Signal()
			}
		} else {
			c = d.ready[0]
			d.ready = d.ready[:copy(d.ready, d.ready[1:])]
			c.queued = false
			h, payload = c.packet(room)
		}
		h.DstCID = uint64(d.config.GuestCID())
		var b [headerBytes]byte
		h.encode(&b)
		d.chain.WriteAt(b[:], 0)
		d.chain.WriteAt(payload, headerBytes)
		if c != nil {
			c.took(len(payload))
		}
		if err := q.Done(&d.chain, headerBytes+h.Len); err != nil {
			return err
		}
	}
	q.Signal()
	return nil
}

// turn puts a connection that has something for the guest to the front of
// ready, if there is one.
func (d *Device) turn() bool {
	for len(d.ready) > 0 {
		c := d.ready[0]
		if c.wants() {
			return true
		}
		c.queued = false
		d.ready = d.ready[:copy(d.ready, d.ready[1:])]
	}
	return false
}
