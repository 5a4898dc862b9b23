package virtio

import (
	"context"
	"sync"
)

// Worker serves one queue in a goroutine of its own, a request at a time: what
// a device needs whose requests do not wait for anything. Its methods are
// called one at a time.
type Worker struct {
	queue  *Queue
	notify Notifier
	serve  func(c *Chain) (written uint32)
	pause  chan chan struct{} // carries what closes when the worker shall go on
	stop   chan struct{}
	resume chan struct{} // nil while it runs
	ended  sync.WaitGroup
}

// StartWorker starts a worker. serve handles a request and returns how many
// bytes it has written to the front of its writable part.
func StartWorker(q *Queue, n Notifier, serve func(c *Chain) (written uint32)) *Worker {
	w := &Worker{queue: q, notify: n, serve: serve, pause: make(chan chan struct{}), stop: make(chan struct{})}
	w.ended.Go(w.run)
	return w
}

func (w *Worker) run() {
	var c Chain
	for {
		select {
		case <-w.stop:
			return
		case resume := <-w.pause:
			select {
			case <-w.stop:
				return
			case <-resume:
			}
		case <-w.queue.Kick():
			if err := w.batch(&c); err != nil {
				w.notify.NeedsReset(err)
			}
		}
	}
}

// batch serves what is available, and no more than a ring's worth before it
// looks for a pause: a driver may go on adding requests for ever.
func (w *Worker) batch(c *Chain) error {
	for n := 0; ; n++ {
		if n == int(w.queue.MaxSize()) {
			w.queue.Signal()
			break
		}
		ok, err := w.queue.Next(c)
		if err != nil {
			return err
		}
		if !ok {
			break
		}
		if err := w.queue.Done(c, w.serve(c)); err != nil {
			return err
		}
	}
	w.queue.Notify()
	return nil
}

// Pause returns when the worker is idle, and it stays so until Resume. When ctx
// ends first, the worker goes on.
func (w *Worker) Pause(ctx context.Context) error {
	if w.resume != nil {
		return nil
	}
	resume := make(chan struct{})
	select {
	case w.pause <- resume:
		w.resume = resume
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Resume undoes Pause.
func (w *Worker) Resume() {
	if w.resume != nil {
		close(w.resume)
		w.resume = nil
	}
}

// Stop ends the worker and waits for it.
func (w *Worker) Stop() {
	close(w.stop)
	w.ended.Wait()
}
