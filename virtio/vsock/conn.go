package vsock

import (
	"net"
	"slices"
	"time"

	"github.com/govmm/govmm/virtio"
	"golang.org/x/sys/unix"
)

// ports identify a connection: there is one host and one guest.
type ports struct{ host, guest uint32 }

const (
	// answerTime is how long the guest may take to answer a connection of the
	// host, or to confirm the end of one. Linux waits for 2 and for 8 s.
	answerTime = 10 * time.Second
	// drainTime is how long a program of the host may pause reading after the
	// guest has closed its end.
	drainTime = 10 * time.Second
	// hurryTime replaces drainTime when the VM ends.
	hurryTime = time.Second
)

// Packets that a connection has to send to the guest, besides data and its end.
const (
	dueRequest = 1 << iota
	dueResponse
	dueCredit // CREDIT_UPDATE
)

// conn is a connection. [Device.serving] guards all fields that change.
type conn struct {
	d  *Device
	at ports

	host        *net.UnixConn // nil while the device connects to the host's program
	established bool
	ended       bool // the guest does not know it any more
	draining    bool // the bytes of in still go to the host
	tasks       int  // goroutines
	timer       *time.Timer

	due    uint8
	queued bool // in Device.ready

	// From the guest.
	greeting []byte // the answer to CONNECT: goes to the host before in
	in       []byte
	writing  int    // bytes in the Write under way
	written  uint32 // bytes that the host's program has taken: fwd_cnt, modulo 2^32
	told     uint32 // the value of written that the guest was sent last

	// To the guest.
	out       []byte
	sent      uint32
	peerAlloc uint32 // the guest's buf_alloc and fwd_cnt
	peerFwd   uint32
	asked     bool // the guest was asked for credit and has given none since

	guestShut uint8 // directions that the guest has shut down
	hostShut  uint8 // directions that the host's program has shut down
	shutSent  uint8 // the part of hostShut that the guest was sent

	gone  chan struct{} // closed when ended
	fed   chan struct{} // has a value when in, guestShut or draining has changed
	taken chan struct{} // has a value when out is empty
}

// add makes a connection. serving is held.
func (d *Device) add(at ports) *conn {
	c := &conn{
		d: d, at: at,
		gone: make(chan struct{}), fed: make(chan struct{}, 1), taken: make(chan struct{}, 1),
	}
	d.conns[at], d.all[c] = c, true
	return c
}

// full reports whether there are as many connections as there may be. serving is held.
func (d *Device) full() bool { return len(d.all)+len(d.clients) >= d.most }

// budget is how many connections a device may have. Each is an open file: a quarter of those
// that the process may have is left to a guest, and the rest to disks, the API and a migration.
func budget() int {
	var files unix.Rlimit
	if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &files); err != nil { // as the sandbox allows
		return maxConnections / 8 // a quarter of the least that is usual
	}
	return int(min(maxConnections, files.Cur/4))
}

// handle handles a packet of the guest. serving is held, as in all that follows.
func (c *conn) handle(h *header, packet *virtio.Chain) {
	c.peerAlloc, c.peerFwd = h.BufAlloc, h.FwdCnt
	if c.asked && c.credit() > 0 {
		c.asked = false
	}
	switch {
	case h.Op == opReset:
		// If the guest had closed the connection, this is its normal end;
		// otherwise the guest aborts it.
		c.end(c.guestShut&shutSend != 0)
		return
	case h.Op == opResponse && !c.established && c.host != nil && c.due&dueRequest == 0:
		c.accepted()
	case h.Op == opCreditUpdate:
	case h.Op == opCreditRequest:
		c.due |= dueCredit
	case h.Op == opShutdown && c.established:
		if c.shutdown(uint8(h.Flags) & shutBoth) {
			return
		}
	case h.Op == opData && c.established && c.guestShut&shutSend == 0 && c.room(h.Len):
		c.data(h.Len, packet)
	default:
		c.reset(false) // not allowed in this state, or beyond the credit
		return
	}
	c.enqueue()
}

// room reports whether the guest's credit covers n bytes.
func (c *conn) room(n uint32) bool {
	return uint64(n)+uint64(len(c.in)+c.writing) <= bufferSize
}

// data takes the payload of a packet.
func (c *conn) data(n uint32, packet *virtio.Chain) {
	if c.hostShut&shutReceive != 0 {
		c.wrote(n) // the host's program reads no more
		return
	}
	have := len(c.in)
	c.in = append(c.in, make([]byte, n)...)
	packet.ReadAt(c.in[have:], headerBytes)
	signal(c.fed)
}

// wrote counts bytes that the guest gets credit for again, and tells the guest when
// they are many.
func (c *conn) wrote(n uint32) {
	c.written += n
	if c.written-c.told >= bufferSize/2 {
		c.due |= dueCredit
	}
}

// shutdown handles the guest's SHUTDOWN. It reports whether the connection has
// ended, which it does when both directions are shut down (5.10.6.5). What the
// guest has sent still goes to the host.
func (c *conn) shutdown(flags uint8) bool {
	c.guestShut |= flags
	if c.guestShut == shutBoth {
		c.reset(true)
		return true
	}
	if c.guestShut&shutReceive != 0 {
		_ = c.host.CloseRead() // the program gets EPIPE when it writes
		c.out = nil
		signal(c.taken)
	}
	signal(c.fed)
	return false
}

// accepted handles the guest's RESPONSE to a connection of the host.
func (c *conn) accepted() {
	c.timer.Stop()
	c.greeting = greeting(c.at.host)
	c.establish()
}

// establish starts to move data.
func (c *conn) establish() {
	c.established = true
	c.start(c.read)
	c.start(c.write)
}

// start starts a goroutine of the connection.
func (c *conn) start(f func()) {
	c.tasks++
	c.d.tasks.Go(func() {
		f()
		c.d.serving.Lock()
		defer c.d.serving.Unlock()
		c.tasks--
		c.release()
	})
}

// reset ends the connection and tells the guest.
func (c *conn) reset(drain bool) {
	c.end(drain)
	c.d.sendReset(Reset{CID: hostCID, HostPort: c.at.host, GuestPort: c.at.guest, Type: typeStream})
}

// end ends the connection for the guest. With drain the host's program still gets
// what the guest has sent.
func (c *conn) end(drain bool) {
	if c.ended {
		return
	}
	c.ended = true
	delete(c.d.conns, c.at)
	if c.queued { // a guest that takes nothing would have it wait for ever
		c.queued = false
		c.d.ready = slices.DeleteFunc(c.d.ready, func(r *conn) bool { return r == c })
	}
	close(c.gone)
	if c.timer != nil {
		c.timer.Stop()
	}
	if c.host != nil {
		if c.draining = drain && c.established; c.draining {
			_ = c.host.CloseRead()
			_ = c.host.SetReadDeadline(time.Unix(1, 0)) // ends the goroutine that reads
			_ = c.host.SetWriteDeadline(time.Now().Add(drainTime))
			signal(c.fed)
			if c.d.closed {
				c.hurry()
			}
		} else {
			_ = c.host.Close() // ends its goroutines
		}
	}
	c.out, c.due = nil, 0
	c.release()
}

// hurry makes a connection that is being drained end soon.
func (c *conn) hurry() {
	if c.host != nil {
		_ = c.host.SetWriteDeadline(time.Now().Add(hurryTime))
	}
}

// release closes the socket of a connection that has ended, when its goroutines
// have, too.
func (c *conn) release() {
	if !c.ended || c.tasks > 0 {
		return
	}
	if c.host != nil {
		_ = c.host.Close() // all is written
	}
	delete(c.d.all, c)
}

// credit is how many bytes the guest has room for; 0 if its counters are invalid.
func (c *conn) credit() uint32 {
	inFlight := c.sent - c.peerFwd
	if inFlight >= c.peerAlloc {
		return 0
	}
	return c.peerAlloc - inFlight
}

// shutDue is which directions to send to the guest as shut down. The end of the
// data is sent behind all of it.
func (c *conn) shutDue() uint8 {
	due := c.hostShut &^ c.shutSent
	if len(c.out) > 0 {
		due &^= shutSend
	}
	return due
}

// wants reports whether there is something for the guest.
func (c *conn) wants() bool {
	return !c.ended && (c.due != 0 || c.shutDue() != 0 || len(c.out) > 0 && (c.credit() > 0 || !c.asked))
}

// enqueue puts the connection into ready if it has something for the guest.
func (c *conn) enqueue() {
	if !c.queued && c.wants() {
		c.queued = true
		c.d.ready = append(c.d.ready, c)
		signal(c.d.wake)
	}
}

// packet returns the next packet for the guest and its payload, at most room
// bytes. wants has returned true.
func (c *conn) packet(room int) (header, []byte) {
	h := header{
		SrcCID: hostCID, SrcPort: c.at.host, DstPort: c.at.guest, Type: typeStream,
		BufAlloc: bufferSize, FwdCnt: c.written,
	}
	c.told = c.written
	take := func(due uint8, op uint16) bool {
		if c.due&due == 0 {
			return false
		}
		c.due &^= due
		h.Op = op
		return true
	}
	switch n := min(uint32(len(c.out)), c.credit(), uint32(room)); {
	case take(dueRequest, opRequest), take(dueResponse, opResponse):
	case n > 0:
		c.due &^= dueCredit // each packet has the credit
		h.Op, h.Len = opData, n
		return h, c.out[:n]
	case c.shutDue() != 0:
		h.Op = opShutdown
		c.shutSent |= c.shutDue()
		h.Flags = uint32(c.shutSent)
		if c.shutSent == shutBoth {
			c.limit()
		}
	case take(dueCredit, opCreditUpdate):
	default:
		h.Op, c.asked = opCreditRequest, true
	}
	return h, nil
}

// took notes that the guest has got a packet with n bytes of payload.
func (c *conn) took(n int) {
	c.sent += uint32(n)
	if c.out = c.out[n:]; n > 0 && len(c.out) == 0 {
		signal(c.taken)
	}
	c.enqueue()
}

// limit ends the connection if the guest does not answer in time. It sends no RST
// for a request that the guest has not got yet.
func (c *conn) limit() {
	c.timer = time.AfterFunc(c.d.answerTime, func() {
		c.d.serving.Lock()
		defer c.d.serving.Unlock()
		switch {
		case c.ended || c.established && c.shutSent != shutBoth:
		case c.due&dueRequest != 0:
			c.end(false)
		default:
			c.reset(false)
		}
	})
}
