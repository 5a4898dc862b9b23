package vsock

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/govmm/govmm/virtio"
)

// when is what a server's Ready returns.
func when(ready bool) time.Duration {
	if ready {
		return 0
	}
	return virtio.Never
}

// All that follows is called with serving held.

func (d *Device) canTell() time.Duration { return when(d.lost) }

// tell puts TRANSPORT_RESET into the event queue (5.10.6.7).
func (d *Device) tell(c *virtio.Chain) (uint32, error) {
	if n := c.WritableLen(); n < eventBytes {
		return 0, fmt.Errorf("vsock: an event buffer of %d bytes", n)
	}
	var event [eventBytes]byte
	binary.LittleEndian.PutUint32(event[:], eventTransportReset)
	c.WriteAt(event[:], 0)
	d.lost = false
	return eventBytes, nil
}

func (d *Device) canTransmit() time.Duration { return when(len(d.resets) < maxResets) }

// transmit takes a packet of the guest's.
func (d *Device) transmit(c *virtio.Chain) (uint32, error) {
	var b [headerBytes]byte
	if n := c.ReadAt(b[:], 0); n < headerBytes {
		return 0, fmt.Errorf("vsock: a packet of %d bytes, shorter than its header", n)
	}
	h := decodeHeader(&b)
	if room := c.ReadableLen() - headerBytes; h.Op == opData && uint64(h.Len) > uint64(room) {
		return 0, fmt.Errorf("vsock: a packet that says it has %d bytes, and has %d", h.Len, room)
	}
	d.handle(&h, c)
	return 0, nil
}

// handle acts on a packet of the guest's.
func (d *Device) handle(h *header, packet *virtio.Chain) {
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
		c.handle(h, packet)
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

func (d *Device) canReceive() time.Duration { return when(len(d.resets) > 0 || d.turn()) }

// receive gives the guest what there is for it: refusals first, then a packet
// of each connection by turns.
func (d *Device) receive(chain *virtio.Chain) (uint32, error) {
	// Room for less than a byte of data is of no use to either side.
	room := chain.WritableLen() - headerBytes
	if room < 1 {
		return 0, fmt.Errorf("vsock: a receive buffer of %d bytes", room+headerBytes)
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
