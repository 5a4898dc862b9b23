package net

import (
	"encoding/binary"
	"errors"
	"sync/atomic"
	"time"

	"github.com/govmm/govmm/virtio"
)

// errShort: a receive buffer has no writable byte.
var errShort = errors.New("net: a receive buffer without room")

// receiver serves a receive queue, section 5.1.6.4: it reads a frame from its
// port and writes it to the buffers that the guest has made available. While the
// buffers are too few it keeps the frame and waits. Further frames wait in the
// host, or are dropped there.
type receiver struct {
	d     *Device
	port  Port
	queue *virtio.Queue
	merge bool          // VIRTIO_NET_F_MRG_RXBUF
	most  int           // bytes of a frame that is not to be segmented, with its header
	guest atomic.Uint64 // Guest features that frames may use
	idle  func()        // the queue's Notify

	// The rest belongs to the queue's task.
	active bool // the port is attached
	gone   bool // until the port is back
	frame  int  // bytes in buf; 0: none
	room   int  // bytes in the buffers that were taken for the frame
	count  int  // segments in these buffers
	buf    [HeaderBytes + maxFrame]byte
}

func newReceiver(d *Device, pair int, q *virtio.Queue, features uint64) *receiver {
	return &receiver{d: d, port: d.ports[pair], queue: q, idle: q.Notify, merge: features&FeatureMergeableRxBuffers != 0,
		most: HeaderBytes + d.maxPlain(features)}
}

func (r *receiver) task() virtio.Task {
	return virtio.Task{
		Servers:   []virtio.Server{{Queue: r.queue, Ready: r.ready, Gather: r.gather, Empty: r.empty}},
		Interrupt: r.port.Interrupt,
		Continue:  r.port.Continue,
	}
}

// ready waits for a frame.
func (r *receiver) ready() time.Duration {
	for r.frame == 0 {
		if !r.active || r.gone {
			return virtio.Never
		}
		if wait := r.wait(); wait > 0 {
			return wait
		}
		n, err := r.port.Read(r.buf[:], r.idle)
		switch {
		case errors.Is(err, ErrInterrupted):
			return virtio.Never
		case err != nil:
			r.gone = true
			r.d.lost(err)
		case !r.d.linkUp.Load() || !checkReceived(r.buf[:n], r.guest.Load(), r.most):
			r.d.counters.rxDropped.Add(1)
		default:
			r.d.toGuest.Spend(1, max(n-HeaderBytes, minCost))
			r.frame = n
		}
	}
	return 0
}

// gather writes the frame to the buffers when they are long enough. It drops a
// frame that a full ring of buffers cannot hold.
func (r *receiver) gather(chains []virtio.Chain, written []uint32) (int, error) {
	p, last := r.buf[:r.frame], &chains[len(chains)-1]
	if len(chains) == 1 {
		r.room, r.count = 0, 0
	}
	if last.WritableLen() == 0 {
		return 0, errShort
	}
	r.room += last.WritableLen()
	r.count += len(last.Writable)
	if r.room < len(p) {
		if size := int(r.queue.Size()); r.merge && len(chains) < size && r.count < size {
			return virtio.Keep, nil
		}
		r.d.counters.rxDropped.Add(1)
		r.frame = 0
		return virtio.PutBack, nil
	}
	// Before VIRTIO_NET_F_MRG_RXBUF the field is 1 as well (5.1.6.4.1).
	binary.LittleEndian.PutUint16(p[headerNumBuffers:], uint16(len(chains)))
	left := p
	for i := range chains {
		n := fill(&chains[i], left)
		written[i], left = uint32(n), left[n:]
	}
	r.d.counters.rxFrames.Add(1)
	r.d.counters.rxBytes.Add(uint64(len(p) - HeaderBytes))
	r.frame = 0
	return len(chains), nil
}

// empty puts back buffers that are not long enough for the frame.
func (r *receiver) empty([]virtio.Chain, []uint32) int { return virtio.PutBack }

// fill copies as much of p to a chain as fits.
func fill(c *virtio.Chain, p []byte) int {
	done := 0
	for i := range c.Writable {
		done += copy(c.Writable[i].Buf, p[done:])
	}
	return done
}

// setActive sets whether the port is attached.
func (r *receiver) setActive(on bool) { r.d.loop.Call(r.queue, func() { r.active = on }) }
