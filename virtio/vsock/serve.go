package vsock

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/govmm/govmm/virtio"
)

// when is the result of a Ready.
func when(ready bool) time.Duration {
	if ready {
		return 0
	}
	return virtio.Never
}

// serving is held in all functions that follow.

func (d *Device) canTell() time.Duration { return when(d.lost) }

// tell puts TRANSPORT_RESET into the event queue (5.10.6.7).
func (d *Device) tell(c *virtio.Chain) (uint32, error) {
	if n := c.WritableLen(); n < eventBytes {
		return 0, fmt.Errorf("vsock: an event buffer must have at least %d bytes, got %d", eventBytes, n)
	}
	var event [eventBytes]byte
	binary.LittleEndian.PutUint32(event[:], eventTransportReset)
	c.WriteAt(event[:], 0)
	d.lost = false
	return eventBytes, nil
}

func (d *Device) canTransmit() time.Duration { return when(len(d.resets) < maxResets) }

// transmit takes a packet of the guest.
func (d *Device) transmit(c *virtio.Chain) (uint32, error) {
	var b [headerBytes]byte
	if n := c.ReadAt(b[:], 0); n < headerBytes {
		return 0, fmt.Errorf("vsock: a packet must have at least %d bytes, got %d", headerBytes, n)
	}
	h := decodeHeader(&b)
	if room := c.ReadableLen() - headerBytes; h.Op == opData && uint64(h.Len) > uint64(room) {
		return 0, fmt.Errorf("vsock: a packet with a length of %d has %d bytes", h.Len, room)
	}
	d.handle(&h, c)
	return 0, nil
}

// handle handles a packet of the guest.
func (d *Device) handle(h *header, packet *virtio.Chain) {
	if h.SrcCID != uint64(d.config.GuestCID()) {
		return // an invalid sender gets no answer
	}
	if h.DstCID != hostCID || h.Type != typeStream {
		d.refuse(h)
		return
	}
	c := d.conns[ports{h.DstPort, h.SrcPort}]
	switch {
	case c != nil:
		c.handle(h, packet)
	case h.Op == opRequest:
		d.dial(h)
	default:
		d.refuse(h)
	}
}

// refuse answers a packet without a connection by RST, unless it is an RST.
func (d *Device) refuse(h *header) {
	if h.Op != opReset {
		d.sendReset(Reset{CID: h.DstCID, HostPort: h.DstPort, GuestPort: h.SrcPort, Type: h.Type})
	}
}

func (d *Device) sendReset(r Reset) {
	d.resets = append(d.resets, r)
	signal(d.wake)
}

func (d *Device) canReceive() time.Duration { return when(len(d.resets) > 0 || d.turn()) }

// receive gives the guest a packet: refusals first, then one of each connection in
// turn.
func (d *Device) receive(chain *virtio.Chain) (uint32, error) {
	// Without room for a byte of data a connection could not go on.
	room := chain.WritableLen() - headerBytes
	if room < 1 {
		return 0, fmt.Errorf("vsock: a receive buffer must have at least %d bytes, got %d", headerBytes+1, room+headerBytes)
	}
	var h header
	var payload []byte
	var c *conn
	if len(d.resets) > 0 {
		h = d.resets[0].header()
		d.resets = d.resets[:copy(d.resets, d.resets[1:])]
	} else {
		c = d.ready[0]
		d.ready = d.ready[:copy(d.ready, d.ready[1:])]
		c.queued = false
		h, payload = c.packet(room)
	}
	h.DstCID = uint64(d.config.GuestCID())
	var b [headerBytes]byte
	h.encode(&b)
	chain.WriteAt(b[:], 0)
	chain.WriteAt(payload, headerBytes)
	if c != nil {
		c.took(len(payload))
	}
	return headerBytes + h.Len, nil
}

// turn removes connections from the front of ready that have nothing for the guest,
// and reports whether one is left.
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
