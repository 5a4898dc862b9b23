package balloon

import (
	"context"
	"errors"
	"sync"

	"github.com/govmm/govmm/virtio"
)

// loop serves one queue in a goroutine, as virtio.Worker does, for requests
// that are not answered one by one as they come. Its methods are called one at
// a time.
type loop struct {
	queue *virtio.Queue
	// kicked serves what is available.
	kicked func()
	// quiet is called before a pause: no chain may be out after it.
	quiet func()
	// ended is called at the end: no chain may be out after it.
	ended func()

	do      chan func()
	stop    chan struct{}
	resumed chan struct{} // nil while it runs
	running sync.WaitGroup
}

func (l *loop) start() {
	l.do, l.stop = make(chan func()), make(chan struct{})
	l.running.Go(func() {
		defer l.ended()
		for {
			select {
			case <-l.stop:
				return
			case f := <-l.do:
				f()
			case <-l.queue.Kick():
				l.kicked()
			}
		}
	})
}

// errEnded: the loop has ended, with the driver that it served.
var errEnded = errors.New("the balloon driver has gone")

// ask has f called in the goroutine, as soon as that is neither busy nor
// paused. It does not wait for f to return.
func (l *loop) ask(ctx context.Context, f func()) error {
	select {
	case l.do <- f:
		return nil
	case <-l.stop:
		return errEnded
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// call has f called in the goroutine and returns afterwards. While the loop is
// paused it does nothing: no chain is out.
func (l *loop) call(f func()) {
	if l.resumed != nil {
		return
	}
	done := make(chan struct{})
	l.do <- func() { f(); close(done) }
	<-done
}

// pause returns when the goroutine is idle, and it stays so until resume. When
// ctx ends first it goes on.
func (l *loop) pause(ctx context.Context) error {
	if l.resumed != nil {
		return nil
	}
	idle, resumed := make(chan struct{}), make(chan struct{})
	err := l.ask(ctx, func() {
		l.quiet()
		close(idle)
		select {
		case <-resumed:
		case <-l.stop:
		}
	})
	if err != nil {
		return err
	}
	l.resumed = resumed
	<-idle
	return nil
}

func (l *loop) resume() {
	if l.resumed != nil {
		close(l.resumed)
		l.resumed = nil
	}
}

// end stops the goroutine and waits for it.
func (l *loop) end() {
	close(l.stop)
	l.running.Wait()
}
