package virtio

import (
	"context"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/govmm/govmm/mempage"
)

// Loop serves the queues of a device: it waits for a kick, takes requests, has
// the device serve them, and gives them back. A device makes one in Activate,
// starts a [Task] for each goroutine that it needs, and calls Stop in Reset.
//
// What a Loop promises:
//
//   - Whatever error a driver provokes, no chain stays out. A request whose
//     Serve or Gather fails is dropped, with all that its server has kept; the
//     driver is told by NeedsReset, and no queue of the loop is served until
//     the driver resets the device.
//   - A page of the guest's memory that the host cannot access is an error like
//     one that the driver provokes.
//   - Between any two requests a task checks for Pause, Stop, Call and
//     ResetQueue. They return if each Ready, Serve and Gather does. A function
//     that works for long checks [Loop.Urgent] now and then, and leaves out the
//     rest or puts the request back.
//   - After Pause no chain is out and no function of the device runs, until
//     Resume. Chains that were kept are back in their queue.
//   - After Stop no chain is out and all goroutines have ended.
//
// Start is not called after Stop. Pause, Resume and Stop are called one at a
// time; all other methods by any goroutine. Methods of a nil Loop do nothing.
type Loop struct {
	notify Notifier
	ended  sync.WaitGroup
	urgent atomic.Int32 // callers that wait for the tasks
	broken atomic.Bool

	// control guards all below, and each task's calls, interrupted and over.
	control  sync.Mutex
	tasks    []*running
	paused   bool
	stopping bool
	quiet    int           // tasks that wait for the end of a pause
	allQuiet chan struct{} // if not nil, closed when all are, or have ended
}

// Task is a goroutine that serves some queues in turn, one request of each.
type Task struct {
	Servers []Server // at most 3
	// Wake has a value when the result of a Ready or of an Empty may have
	// changed. It may be nil.
	Wake <-chan struct{}
	// Lock is held while a request is taken, served and given back, and while
	// the servers' other functions run. It may be nil.
	Lock sync.Locker
	// Interrupt makes a Ready return that waits for input from the host, now
	// or later; Continue undoes it. Both may be nil. They are called one at a
	// time, and do not wait.
	Interrupt, Continue func() error
}

// Server is what a device does with the requests of one queue. Its functions
// are called in the task's goroutine.
type Server struct {
	Queue *Queue
	// Serve carries out a request, and returns how many bytes it has written to
	// the front of the writable part.
	Serve func(c *Chain) (written uint32, err error)
	// Gather replaces Serve where requests are not answered one by one. It gets
	// the requests that are out, the new one last, and returns how many of
	// them, from the first, to give back together, after it has set written
	// for these; or it returns [Keep] or [PutBack].
	Gather func(chains []Chain, written []uint32) (done int, err error)
	// Ready returns 0 if a request can be served now, otherwise how long to
	// wait, or [Never] to wait for Wake. Nil means always ready.
	Ready func() (wait time.Duration)
	// Empty is called when the queue has no more requests, with the requests
	// that are out, and returns what Gather does. Nil means [Keep].
	Empty func(chains []Chain, written []uint32) (done int)
	// Reset is called when the driver resets the queue, after the requests that
	// are out have been dropped. It may be nil.
	Reset func()
	// Parallel says that several tasks serve the queue: a task that takes a
	// request wakes the next one. Such a server keeps and puts back nothing.
	Parallel bool
}

const (
	// Keep leaves all requests out. They are put back when the device pauses,
	// and dropped when the driver resets the queue or the device.
	Keep = 0
	// PutBack puts all requests back into the queue.
	PutBack = -1
	// Never is a wait for Wake.
	Never = time.Duration(math.MaxInt64)
)

// running is a task with its goroutine's state.
type running struct {
	Task
	loop      *Loop
	attention chan struct{} // has a value when a caller waits for the task
	servers   []server
	timer     *time.Timer // nil until needed
	// interrupted: Interrupt was called, and Continue not yet. Set under
	// Loop.control.
	interrupted atomic.Bool

	// Guarded by Loop.control.
	calls []func()
	over  bool
}

// server is a Server with its requests that are out.
type server struct {
	*Server
	chains  []Chain
	written []uint32
	out     int           // the first of chains
	wait    time.Duration // what Ready said
	unsaid  int           // requests given back since the last Notify
	limit   int           // Notify comes at that many
}

// NewLoop makes a loop without tasks.
func NewLoop(n Notifier) *Loop { return &Loop{notify: n} }

// Start starts a task.
func (l *Loop) Start(t Task) {
	r := &running{Task: t, loop: l, attention: make(chan struct{}, 1)}
	for i := range t.Servers {
		s := &t.Servers[i]
		limit := int(s.Queue.MaxSize())
		if s.Parallel {
			limit = 1
		}
		r.servers = append(r.servers, server{Server: s, limit: limit, chains: make([]Chain, 1), written: make([]uint32, 1)})
	}
	l.control.Lock()
	l.tasks = append(l.tasks, r)
	l.control.Unlock()
	l.ended.Go(r.run)
}

// Urgent reports whether a Pause, Stop, Call or ResetQueue waits for a task.
func (l *Loop) Urgent() bool { return l != nil && l.urgent.Load() > 0 }

// Pause returns when no task runs and no chain is out. If ctx ends first, the
// tasks go on and Pause returns ctx's cause.
func (l *Loop) Pause(ctx context.Context) error {
	if l == nil {
		return nil
	}
	l.control.Lock()
	if l.paused {
		l.control.Unlock()
		return nil
	}
	l.paused = true
	l.urgent.Add(1)
	quiet := make(chan struct{})
	l.allQuiet = quiet
	l.attractAll()
	l.settle()
	l.control.Unlock()
	select {
	case <-quiet:
		return nil
	case <-ctx.Done():
		l.Resume()
		return context.Cause(ctx)
	}
}

// Resume undoes Pause.
func (l *Loop) Resume() {
	if l == nil {
		return
	}
	l.control.Lock()
	defer l.control.Unlock()
	if l.paused {
		l.paused, l.allQuiet = false, nil
		l.urgent.Add(-1)
		l.attractAll()
	}
}

// Stop ends the tasks and waits for them.
func (l *Loop) Stop() {
	if l == nil {
		return
	}
	l.control.Lock()
	if !l.stopping {
		l.stopping = true
		l.urgent.Add(1)
		l.attractAll()
	}
	l.control.Unlock()
	l.ended.Wait()
}

// Call calls f in each goroutine that serves q, between two requests, and returns
// afterwards. It does so during a pause, too. If the goroutine has ended, f runs
// in the caller's. A goroutine that serves q must not use Call.
func (l *Loop) Call(q *Queue, f func()) {
	if l == nil {
		return
	}
	l.call(q, func(*server) { f() })
}

// ResetQueue drops the requests of q that are out between two calls of Gather,
// and calls Reset of its servers. It implements [Device].ResetQueue.
func (l *Loop) ResetQueue(q *Queue) {
	if l == nil {
		return
	}
	l.call(q, func(s *server) {
		s.drop()
		if s.Reset != nil {
			s.Reset()
		}
	})
}

// call calls f for each server of q.
func (l *Loop) call(q *Queue, f func(*server)) {
	var called sync.WaitGroup
	l.urgent.Add(1)
	defer l.urgent.Add(-1)
	l.control.Lock()
	for _, t := range l.tasks {
		for i := range t.servers {
			s := &t.servers[i]
			if s.Queue != q {
				continue
			}
			called.Add(1)
			t.calls = append(t.calls, func() {
				defer called.Done()
				t.locked(func() { f(s) })
			})
			if t.over {
				t.runCalls()
			} else {
				t.attract()
			}
		}
	}
	l.control.Unlock()
	called.Wait()
}

func (l *Loop) attractAll() {
	for _, t := range l.tasks {
		t.attract()
	}
}

// settle ends the wait in Pause when all tasks are quiet. control is held.
func (l *Loop) settle() {
	quiet := l.quiet
	for _, t := range l.tasks {
		if t.over {
			quiet++
		}
	}
	if l.allQuiet != nil && quiet == len(l.tasks) {
		close(l.allQuiet)
		l.allQuiet = nil
	}
}

// fail tells the driver, once, that it has broken a rule.
func (l *Loop) fail(err error) {
	if l.broken.CompareAndSwap(false, true) {
		l.notify.NeedsReset(err)
	}
}

// attract makes the goroutine call attend. control is held.
func (t *running) attract() {
	if t.Interrupt != nil && !t.over {
		t.interrupted.Store(true)
		_ = t.Interrupt() // after an error the next Ready fails, too
	}
	signal(t.attention)
}

// run waits for the first kick: a driver may not expect an answer to requests
// that it has not announced.
func (t *running) run() {
	t.sleep()
	for t.attend() {
		if !t.turn() {
			t.sleep()
		}
	}
}

// attend does what callers wait for: calls, a pause, the end. It returns false at
// the end.
func (t *running) attend() bool {
	l := t.loop
	if l.urgent.Load() == 0 && !t.interrupted.Load() {
		return true
	}
	t.locked(t.say)
	l.control.Lock()
	defer l.control.Unlock()
	for {
		if t.interrupted.Load() {
			t.interrupted.Store(false)
			_ = t.Continue()
		}
		switch {
		case len(t.calls) > 0:
			t.runCalls()
		case l.stopping:
			t.release((*server).drop)
			t.over = true
			l.settle()
			return false
		case l.paused:
			t.release((*server).putBack)
			l.quiet++
			l.settle()
			l.control.Unlock()
			<-t.attention
			l.control.Lock()
			l.quiet--
		default:
			return true
		}
	}
}

// runCalls runs the functions of Call. control is held, except while they run.
func (t *running) runCalls() {
	calls := t.calls
	t.calls = nil
	t.loop.control.Unlock()
	defer t.loop.control.Lock()
	for _, f := range calls {
		f()
	}
}

// release calls f for each server. control is held, except while f runs.
func (t *running) release(f func(*server)) {
	t.loop.control.Unlock()
	defer t.loop.control.Lock()
	t.locked(func() {
		for i := range t.servers {
			f(&t.servers[i])
		}
	})
}

// locked calls f. Memory that the host cannot access is an error of the device, as in
// turn.
func (t *running) locked(f func()) {
	if t.Lock != nil {
		t.Lock.Lock()
		defer t.Lock.Unlock()
	}
	if err := mempage.Guard(func() error { f(); return nil }); err != nil {
		t.loop.fail(err)
	}
}

// say notifies the driver of the requests that were given back.
func (t *running) say() {
	for i := range t.servers {
		t.servers[i].say()
	}
}

// turn serves one request of each queue. It returns false if there was none.
func (t *running) turn() bool {
	any := false
	for i := range t.servers {
		if t.loop.broken.Load() {
			return false
		}
		if t.Lock != nil {
			t.Lock.Lock()
		}
		s, served := &t.servers[i], false
		err := mempage.Guard(func() (err error) { served, err = s.serve(); return err })
		if err != nil {
			s.drop()
		}
		if t.Lock != nil {
			t.Lock.Unlock()
		}
		if err != nil {
			t.loop.fail(err)
			return false
		}
		any = any || served
	}
	return any
}

// sleep waits until there may be work.
func (t *running) sleep() {
	wake, wait := t.Wake, Never
	var kicks [3]<-chan struct{}
	for i := range t.servers {
		s := &t.servers[i]
		if s.wait == 0 {
			kicks[i] = s.Queue.kick
		} else {
			wait = min(wait, s.wait)
		}
	}
	if t.loop.broken.Load() {
		wake, wait, kicks = nil, Never, [3]<-chan struct{}{}
	}
	var due <-chan time.Time
	if wait < Never {
		if t.timer == nil {
			t.timer = time.NewTimer(wait)
		} else {
			t.timer.Reset(wait)
		}
		due = t.timer.C
	}
	select {
	case <-t.attention:
	case <-kicks[0]:
	case <-kicks[1]:
	case <-kicks[2]:
	case <-wake:
	case <-due:
	}
}

// serve serves one request. It returns false if there is no request, or none can
// be served now.
func (s *server) serve() (bool, error) {
	s.wait = 0
	if s.Ready != nil {
		if s.wait = s.Ready(); s.wait > 0 {
			s.say()
			return false, nil
		}
	}
	if s.out == len(s.chains) {
		s.chains = append(s.chains, Chain{})
		s.written = append(s.written, 0)
	}
	c := &s.chains[s.out]
	ok, err := s.Queue.Next(c)
	if err != nil {
		return false, err
	}
	if !ok {
		done := Keep
		if s.Empty != nil {
			done = s.Empty(s.chains[:s.out], s.written[:s.out])
		}
		err := s.finish(done)
		s.say()
		return false, err
	}
	s.out++
	if s.Parallel {
		s.Queue.Signal()
	}
	done := 1
	if s.Gather != nil {
		done, err = s.Gather(s.chains[:s.out], s.written[:s.out])
	} else {
		s.written[0], err = s.Serve(c)
	}
	if err != nil {
		return false, err
	}
	return true, s.finish(done)
}

// finish gives back the first requests that are out, or puts all back.
func (s *server) finish(done int) error {
	switch {
	case done == PutBack:
		s.putBack()
		return nil
	case done == Keep:
		return nil
	}
	var err error
	if done == 1 {
		err = s.Queue.Done(&s.chains[0], s.written[0])
	} else {
		err = s.Queue.DoneAll(s.chains[:done], s.written[:done])
	}
	if err != nil {
		return err
	}
	for i := done; i < s.out; i++ {
		s.chains[i-done], s.chains[i] = s.chains[i], s.chains[i-done]
	}
	s.out -= done
	s.shrink(done)
	if s.unsaid += done; s.unsaid >= s.limit {
		s.say()
	}
	return nil
}

// say notifies the driver of the requests that were given back.
func (s *server) say() {
	if s.unsaid > 0 {
		s.unsaid = 0
		s.Queue.Notify()
	}
}

// putBack puts the requests that are out back into the queue.
func (s *server) putBack() {
	defer s.shrink(s.out)
	for ; s.out > 0; s.out-- {
		// Rewind fails if the chain is not the last one that is out.
		if err := s.Queue.Rewind(&s.chains[s.out-1]); err != nil {
			s.drop()
			return
		}
	}
}

// drop drops the requests that are out.
func (s *server) drop() {
	defer s.shrink(s.out)
	for ; s.out > 0; s.out-- {
		_ = s.Queue.Drop(&s.chains[s.out-1]) // an error: it was given back already
	}
}

// shrink frees what the n chains behind those that are out hold, except the first place,
// which is used for every request.
func (s *server) shrink(n int) {
	for i := max(s.out, 1); i < s.out+n; i++ {
		s.chains[i].shrink()
	}
}

// signal puts a value into c, which has room for one, if there is none.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
