package blk

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/govmm/govmm/virtio"
)

// worker carries out requests of a queue, one at a time. All workers of a queue
// wait for its kick; the one that takes a request wakes the next before it
// begins, so that somebody looks for more meanwhile.
type worker struct {
	d      *Device
	queue  *virtio.Queue
	gate   *gate
	broken *atomic.Bool

	chain   virtio.Chain
	bufs    [][]byte
	scratch scratch
}

func (w *worker) run(stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		case <-w.queue.Kick():
		}
		for w.one() {
			select {
			case <-stop:
				return
			default:
			}
		}
	}
}

// one carries out the next request, if there is one.
func (w *worker) one() bool {
	if !w.gate.enter() {
		return false // whoever opens it kicks
	}
	defer w.gate.leave()
	if w.broken.Load() {
		return false
	}
	ok, err := w.queue.Next(&w.chain)
	if err == nil && !ok {
		return false
	}
	if err == nil {
		w.queue.Signal()
		var written uint32
		if written, err = w.serve(); err != nil {
			// It is not one that could be answered.
			_ = w.queue.Drop(&w.chain)
		} else {
			err = w.queue.Done(&w.chain, written)
		}
	}
	if err != nil {
		if w.broken.CompareAndSwap(false, true) {
			w.d.notify.NeedsReset(err)
		}
		return false
	}
	w.queue.Notify()
	return true
}

// gate lets workers in, or keeps them out.
type gate struct {
	workMu sync.Mutex // guards all below
	closed bool
	busy   int
	idle   chan struct{} // if not nil, closed when busy becomes 0
}

func newGate() *gate { return &gate{} }

func (g *gate) enter() bool {
	g.workMu.Lock()
	defer g.workMu.Unlock()
	if g.closed {
		return false
	}
	g.busy++
	return true
}

func (g *gate) leave() {
	g.workMu.Lock()
	defer g.workMu.Unlock()
	if g.busy--; g.busy == 0 && g.idle != nil {
		close(g.idle)
		g.idle = nil
	}
}

// shut closes the gate and waits until nobody is inside. If ctx ends first it
// opens the gate again.
func (g *gate) shut(ctx context.Context) error {
	g.workMu.Lock()
	g.closed = true
	if g.busy == 0 {
		g.workMu.Unlock()
		return nil
	}
	if g.idle == nil {
		g.idle = make(chan struct{})
	}
	idle := g.idle
	g.workMu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		g.open()
		return context.Cause(ctx)
	}
}

func (g *gate) open() {
	g.workMu.Lock()
	defer g.workMu.Unlock()
	g.closed = false
}
