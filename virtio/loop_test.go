package virtio_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// startLoop serves q in one task.
func startLoop(t testing.TB, q *virtio.Queue, serve func(*virtio.Chain)) *virtio.Loop {
	l := virtio.NewLoop(failOn{t})
	l.Start(virtio.Task{Servers: []virtio.Server{{Queue: q, Serve: func(c *virtio.Chain) (uint32, error) {
		serve(c)
		return 0, nil
	}}}})
	return l
}

// looped is a rig with a loop.
type looped struct {
	*rig
	l      *virtio.Loop
	broken chan error
}

func (l *looped) ConfigChanged()       {}
func (l *looped) NeedsReset(err error) { l.broken <- err }

func newLooped(t *testing.T, features uint64, tasks ...virtio.Task) *looped {
	l := &looped{rig: newRig(t, 8, features), broken: make(chan error, 8)}
	l.l = virtio.NewLoop(l)
	for _, task := range tasks {
		for i := range task.Servers {
			task.Servers[i].Queue = l.queue
		}
		l.l.Start(task)
	}
	t.Cleanup(l.l.Stop)
	return l
}

func (l *looped) add(n int) {
	for range n {
		l.driver.Add([]virtiotest.Buffer{{GPA: l.buffers(), Len: 4}}, []virtiotest.Buffer{{GPA: l.buffers() + 8, Len: 4}})
	}
	l.queue.Signal()
}

// used takes what came back.
func (l *looped) used() int {
	n := 0
	for ; ; n++ {
		if _, ok := l.driver.Used(); !ok {
			return n
		}
	}
}

// out is the number of chains that are out, 1 for any.
func (l *looped) out() bool {
	_, err := l.queue.SaveState()
	return errors.Is(err, virtio.ErrInFlight)
}

func TestLoopPauses(t *testing.T) {
	eachLayout(t, func(t *testing.T, features uint64) {
		synctest.Test(t, func(t *testing.T) {
			enter, leave := make(chan struct{}), make(chan struct{})
			l := newLooped(t, features, virtio.Task{Servers: []virtio.Server{{Serve: func(*virtio.Chain) (uint32, error) {
				enter <- struct{}{}
				<-leave
				return 0, nil
			}}}})
			l.add(3)
			<-enter
			// Somebody waits for a task that is busy, and gives up.
			ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errGivenUp)
			defer cancel()
			if err := l.l.Pause(ctx); !errors.Is(err, errGivenUp) {
				t.Fatal(err)
			}
			if l.l.Urgent() {
				t.Error("urgent for nobody")
			}
			leave <- struct{}{}
			<-enter // it goes on
			paused := make(chan error)
			go func() { paused <- l.l.Pause(t.Context()) }()
			synctest.Wait()
			if !l.l.Urgent() {
				t.Error("not urgent")
			}
			leave <- struct{}{}
			check(t, <-paused)
			if n := l.used(); n != 2 || l.out() {
				t.Errorf("%d of 3 requests came back; a chain is out: %v", n, l.out())
			}
			check(t, l.l.Pause(t.Context())) // twice is once
			l.queue.Signal()
			synctest.Wait()
			select {
			case <-enter:
				t.Fatal("served while it was paused")
			default:
			}
			l.l.Resume()
			<-enter
			leave <- struct{}{}
			synctest.Wait()
			if n := l.used(); n != 1 {
				t.Errorf("%d came back after the pause", n)
			}
		})
	})
}

var errGivenUp = errors.New("given up")

// Whatever fails, no chain stays out, and nothing more is served.
func TestLoopDropsWhatFails(t *testing.T) {
	bad := errors.New("bad request")
	for name, server := range map[string]virtio.Server{
		"Serve":  {Serve: func(*virtio.Chain) (uint32, error) { return 0, bad }},
		"length": {Serve: func(*virtio.Chain) (uint32, error) { return 5, nil }},
		"Gather": {Gather: func(chains []virtio.Chain, _ []uint32) (int, error) {
			if len(chains) == 2 {
				return 0, bad
			}
			return virtio.Keep, nil
		}},
		"lengths": {Gather: func(chains []virtio.Chain, written []uint32) (int, error) {
			written[0], written[len(chains)-1] = 0, 5
			return len(chains) &^ 1, nil
		}},
	} {
		t.Run(name, func(t *testing.T) {
			eachLayout(t, func(t *testing.T, features uint64) {
				synctest.Test(t, func(t *testing.T) {
					l := newLooped(t, features, virtio.Task{Servers: []virtio.Server{server}})
					l.add(2)
					<-l.broken
					l.add(1)
					synctest.Wait()
					if l.out() || len(l.broken) > 0 || l.used() > 0 {
						t.Errorf("a chain is out: %v, told again: %d", l.out(), len(l.broken))
					}
					check(t, l.l.Pause(t.Context()))
				})
			})
		})
	}
}

// What is kept is put back for a pause, and dropped when the queue is reset.
func TestLoopKeeps(t *testing.T) {
	eachLayout(t, func(t *testing.T, features uint64) {
		synctest.Test(t, func(t *testing.T) {
			give, resets := false, 0
			wake := make(chan struct{}, 1)
			l := newLooped(t, features, virtio.Task{Wake: wake, Servers: []virtio.Server{{
				Gather: func(chains []virtio.Chain, written []uint32) (int, error) {
					clear(written)
					return max(len(chains)-2, virtio.Keep), nil
				},
				Empty: func(chains []virtio.Chain, written []uint32) int {
					if give {
						return len(chains)
					}
					return virtio.Keep
				},
				Reset: func() { resets++ },
			}}})
			l.add(3)
			synctest.Wait()
			if n := l.used(); n != 1 || !l.out() {
				t.Fatalf("%d came back", n)
			}
			for range 2 {
				check(t, l.l.Pause(t.Context()))
				if l.out() {
					t.Fatal("a chain is out in a pause")
				}
				l.l.Resume()
				synctest.Wait()
				if !l.out() {
					t.Fatal("not taken again")
				}
			}
			l.l.Call(l.queue, func() { give = true })
			wake <- struct{}{}
			synctest.Wait()
			if n := l.used(); n != 2 || l.out() {
				t.Fatalf("%d came back", n)
			}
			l.l.Call(l.queue, func() { give = false })
			l.add(2)
			synctest.Wait()
			l.queue.Quiesce()
			l.l.ResetQueue(l.queue)
			l.queue.Drain()
			if resets != 1 || l.used() != 0 {
				t.Errorf("Reset was called %d times", resets)
			}
		})
	})
}

// A task that waits for something outside is interrupted, and goes on, also
// when whoever interrupted it has given up meanwhile.
func TestLoopInterrupts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		frames, interrupt := make(chan struct{}), make(chan struct{}, 1)
		var interrupted atomic.Bool
		block := make(chan struct{})
		close(block)
		l := newLooped(t, layouts[0].features, virtio.Task{
			Servers: []virtio.Server{{
				Ready: func() time.Duration {
					if interrupted.Load() {
						return virtio.Never
					}
					select {
					case <-frames:
						return 0
					case <-interrupt:
						return virtio.Never
					}
				},
				Serve: func(*virtio.Chain) (uint32, error) { <-block; return 0, nil },
			}},
			Interrupt: func() error {
				interrupted.Store(true)
				select {
				case interrupt <- struct{}{}:
				default:
				}
				return nil
			},
			Continue: func() error {
				interrupted.Store(false)
				select {
				case <-interrupt:
				default:
				}
				return nil
			},
		})
		l.add(4)
		frames <- struct{}{}
		called := false
		l.l.Call(l.queue, func() { called = true })
		check(t, l.l.Pause(t.Context()))
		l.l.Call(l.queue, func() { called = called && !interrupted.Load() })
		if !called {
			t.Error("not called, or interrupted still")
		}
		l.l.Resume()
		frames <- struct{}{}
		l.l.Call(l.queue, func() { block = make(chan struct{}) })
		frames <- struct{}{}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := l.l.Pause(ctx); err == nil {
			t.Error("paused while it was busy")
		}
		close(block)
		frames <- struct{}{}
		synctest.Wait()
		if n := l.used(); n != 4 {
			t.Errorf("%d of 4 requests came back", n)
		}
		l.l.Stop()
		l.l.Call(l.queue, func() { called = false })
		if called {
			t.Error("not called after the end")
		}
	})
}

// Several tasks serve one queue at once, and a pause waits for all of them.
func TestLoopInParallel(t *testing.T) {
	eachLayout(t, func(t *testing.T, features uint64) {
		synctest.Test(t, func(t *testing.T) {
			enter, leave := make(chan struct{}, 8), make(chan struct{})
			task := func() virtio.Task {
				return virtio.Task{Servers: []virtio.Server{{Parallel: true, Serve: func(*virtio.Chain) (uint32, error) {
					enter <- struct{}{}
					<-leave
					return 0, nil
				}}}}
			}
			l := newLooped(t, features, task(), task(), task())
			l.add(4)
			synctest.Wait()
			if len(enter) != 3 {
				t.Fatalf("%d requests are served at once", len(enter))
			}
			paused := make(chan error, 1)
			go func() { paused <- l.l.Pause(t.Context()) }()
			for range 3 {
				synctest.Wait()
				if len(paused) > 0 {
					t.Fatal("paused too early")
				}
				leave <- struct{}{}
			}
			check(t, <-paused)
			if n := l.used(); n != 3 || l.out() {
				t.Errorf("%d came back", n)
			}
			l.l.Resume()
			leave <- struct{}{}
			synctest.Wait()
			if n := l.used(); n != 1 {
				t.Errorf("%d came back", n)
			}
		})
	})
}

// TestLoopWithoutAPage: memory that the host cannot access, of a request or of the
// rings, makes the driver reset the device. Nothing hangs, and the process lives.
func TestLoopWithoutAPage(t *testing.T) {
	for _, where := range []string{"readable", "writable", "rings"} {
		t.Run(where, func(t *testing.T) {
			eachLayout(t, func(t *testing.T, features uint64) {
				l := newLooped(t, features, virtio.Task{Lock: new(sync.Mutex), Servers: []virtio.Server{{Serve: func(c *virtio.Chain) (uint32, error) {
					var p [4]byte
					c.ReadAt(p[:], 0)
					return uint32(c.WriteAt(p[:], 0)), nil
				}}}})
				in, out := l.buffers()+16<<10, l.buffers()+32<<10
				l.driver.Add([]virtiotest.Buffer{{GPA: in, Len: 4}}, []virtiotest.Buffer{{GPA: out, Len: 4}})
				l.mem.Break(t, map[string]uint64{"readable": in, "writable": out, "rings": ramBase}[where])
				l.queue.Signal()
				select {
				case err := <-l.broken:
					if fault := (*mempage.Fault)(nil); !errors.As(err, &fault) {
						t.Errorf("told %v", err)
					}
				case <-time.After(testenv.Patience):
					t.Fatal("the driver is not told")
				}
				check(t, l.l.Pause(t.Context()))
				l.l.Resume()
				l.l.Stop()
				if l.out() {
					t.Error("a chain is out")
				}
			})
		})
	}
}
