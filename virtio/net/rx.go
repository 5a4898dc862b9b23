package net

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/govmm/govmm/virtio"
)

// errShort: a driver gave a receive buffer that nothing can be written to.
var errShort = errors.New("net: a receive buffer without room")

// receiver serves a receive queue, section 5.1.6.4, in a goroutine: it reads a
// frame from its port and writes it to the buffers that the guest has made
// available. While there are too few it keeps the frame and waits; what comes
// meanwhile waits in the host, or is dropped there.
type receiver struct {
	d     *Device
	port  Port
	queue *virtio.Queue
	n     virtio.Notifier
	merge bool          // VIRTIO_NET_F_MRG_RXBUF
	guest atomic.Uint64 // features of the guest's that frames may use

	do      chan func()
	stop    chan struct{}
	resumed chan struct{} // nil while not paused; belongs to the transport's calls
	running sync.WaitGroup

	// The rest is the goroutine's.
	active  bool // the port is attached
	broken  bool // until the driver resets the device, or the port is back
	frame   int  // bytes in buf; 0: none
	chains  [queueSize]virtio.Chain
	written [queueSize]uint32
	buf     [HeaderBytes + maxFrame]byte
}

func startReceiver(d *Device, pair int, q *virtio.Queue, n virtio.Notifier, features uint64) *receiver {
	r := &receiver{
		d: d, port: d.ports[pair], queue: q, n: n, merge: features&FeatureMergeableRxBuffers != 0,
		do: make(chan func()), stop: make(chan struct{}),
	}
	r.running.Go(r.run)
	return r
}

func (r *receiver) run() {
	idle := r.queue.Notify
	for {
		select {
		case <-r.stop:
			return
		case f := <-r.do:
			f()
			continue
		default:
		}
		if !r.active || r.broken {
			r.wait(nil)
			continue
		}
		if r.frame == 0 {
			n, err := r.port.Read(r.buf[:], idle)
			switch {
			case errors.Is(err, ErrInterrupted):
				// Who interrupts wants to have something done.
				r.wait(nil)
				continue
			case err != nil:
				r.broken = true
				r.d.lost(err)
				continue
			case !r.d.linkUp.Load() || !checkReceived(r.buf[:n], r.guest.Load()):
				r.d.counters.rxDropped.Add(1)
				continue
			}
			r.frame = n
		}
		done, err := r.deliver(r.buf[:r.frame])
		switch {
		case err != nil:
			r.broken = true
			r.n.NeedsReset(err)
		case done:
			r.frame = 0
		default:
			idle()
			r.wait(r.queue.Kick())
		}
	}
}

// wait waits for the driver, if kick is not nil, or for something to be done.
// When the end comes it returns, and the loop sees it.
func (r *receiver) wait(kick <-chan struct{}) {
	select {
	case <-r.stop:
	case f := <-r.do:
		f()
	case <-kick:
	}
}

// deliver writes a frame to the guest. It returns false if there are not enough
// buffers yet. A frame for which there never can be enough is dropped.
func (r *receiver) deliver(p []byte) (done bool, err error) {
	taken, segments, room := 0, 0, 0
	size := min(int(r.queue.Size()), len(r.chains))
	for room < len(p) {
		c := &r.chains[taken]
		ok, err := r.queue.Next(c)
		if err != nil {
			return false, err
		}
		if !ok {
			return false, r.putBack(taken)
		}
		taken++
		if c.WritableLen() == 0 {
			return false, errors.Join(errShort, r.putBack(taken))
		}
		room += c.WritableLen()
		segments += len(c.Writable)
		if room < len(p) && (!r.merge || taken >= size || segments >= size) {
			r.d.counters.rxDropped.Add(1)
			return true, r.putBack(taken)
		}
	}
	// Before VIRTIO_NET_F_MRG_RXBUF the field is 1 as well (5.1.6.4.1).
	binary.LittleEndian.PutUint16(p[headerNumBuffers:], uint16(taken))
	left := p
	for i := range taken {
		n := fill(&r.chains[i], left)
		r.written[i], left = uint32(n), left[n:]
	}
	// Done marks what was written as dirty before the guest learns of it.
	if err := r.queue.DoneAll(r.chains[:taken], r.written[:taken]); err != nil {
		return false, fmt.Errorf("net: receive: %w", err)
	}
	r.d.counters.rxFrames.Add(1)
	r.d.counters.rxBytes.Add(uint64(len(p) - HeaderBytes))
	return true, nil
}

// fill copies as much of p as there is room for.
func fill(c *virtio.Chain, p []byte) int {
	done := 0
	for i := range c.Writable {
		done += copy(c.Writable[i].Buf, p[done:])
	}
	return done
}

// putBack leaves the chains that were taken to be taken again.
func (r *receiver) putBack(taken int) error {
	for taken--; taken >= 0; taken-- {
		if err := r.queue.Rewind(&r.chains[taken]); err != nil {
			return fmt.Errorf("net: receive: %w", err)
		}
	}
	return nil
}

// call has f called in the goroutine, between frames, and returns afterwards.
// It must not be called while paused.
func (r *receiver) call(f func()) error {
	err := r.port.Interrupt()
	done := make(chan error)
	r.do <- func() {
		again := r.port.Continue()
		f()
		done <- again
	}
	return errors.Join(err, <-done)
}

// setActive says whether the port is attached.
func (r *receiver) setActive(on bool) error { return r.call(func() { r.active = on }) }

// pause returns when the goroutine is idle. A frame that it has read and found
// no buffer for is kept.
func (r *receiver) pause() error {
	if r.resumed != nil {
		return nil
	}
	idle, resumed := make(chan struct{}), make(chan struct{})
	err := r.port.Interrupt()
	r.do <- func() {
		close(idle)
		select {
		case <-resumed:
		case <-r.stop:
		}
		// The port can be no worse off than gone, which Read tells.
		_ = r.port.Continue()
	}
	<-idle
	r.resumed = resumed
	return err
}

func (r *receiver) resume() {
	if r.resumed != nil {
		close(r.resumed)
		r.resumed = nil
	}
}

// end stops the goroutine and waits for it.
func (r *receiver) end() {
	close(r.stop)
	_ = r.port.Interrupt()
	r.running.Wait()
	_ = r.port.Continue()
}
