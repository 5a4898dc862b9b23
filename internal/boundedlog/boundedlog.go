// Package boundedlog bounds what a guest or a peer makes a program log, and keeps who logs
// from waiting for who reads the log: a device logs under its lock, and on a vCPU's thread.
package boundedlog

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	// every is the time in which one record of a kind is logged at once. What else came
	// is one record at its end: the last one, with their number.
	every = 10 * time.Second
	// maxKinds bounds the kinds that are told apart. Further ones count as one.
	maxKinds = 64
	// maxWaiting is how many records wait for a handler that takes none. Further ones
	// are dropped, and counted.
	maxWaiting = 256
)

// New returns a logger that passes on to log's handler, from a goroutine of its own, the
// first record of a kind and then one in ten seconds, which has as "more" how many it stands
// for. A kind is a message and the attribute "device", whatever the other attributes are.
// A logger that New has returned, or that was derived from one, is returned as it is.
func New(log *slog.Logger) *slog.Logger {
	h := log.Handler()
	if _, ok := h.(*handler); ok {
		return log
	}
	return slog.New(&handler{limits: &limits{kinds: map[kind]*repeats{}}, next: h})
}

// Tell logs now what was counted, of all kinds. log is one that [New] has returned.
func Tell(log *slog.Logger) {
	if h, ok := log.Handler().(*handler); ok {
		h.limits.tellAll()
	}
}

// Flush does what [Tell] does, and waits until the handler has taken everything, or ctx
// ends.
func Flush(ctx context.Context, log *slog.Logger) {
	h, ok := log.Handler().(*handler)
	if !ok {
		return
	}
	h.limits.tellAll()
	select {
	case <-h.limits.taken():
	case <-ctx.Done():
	}
}

// handler is the slog.Handler of New.
type handler struct {
	limits *limits // shared with what WithAttrs and WithGroup return
	next   slog.Handler
	device string                             // of WithAttrs
	watch  func(device string, r slog.Record) // nil: nobody watches
}

// kind is what records have in common of which one in a while is logged.
type kind struct{ message, device string }

// entry is a record on its way to a handler.
type entry struct {
	to     slog.Handler
	record slog.Record
}

// repeats are the records of a kind that have not been logged.
type repeats struct {
	n    int
	last entry
	next *time.Timer
}

// limits are what all loggers of one handler share.
type limits struct {
	kindMu sync.Mutex // guards all below; never held while a handler is called
	kinds  map[kind]*repeats

	waiting []entry
	lost    int           // records since the last one that waits
	idle    chan struct{} // closed when no record waits or is being handled; nil: none is
}

// Enabled implements [slog.Handler].
func (h *handler) Enabled(ctx context.Context, l slog.Level) bool { return h.next.Enabled(ctx, l) }

// Handle implements [slog.Handler]. The error of the next handler is known too late.
func (h *handler) Handle(_ context.Context, r slog.Record) error {
	k := kind{r.Message, h.device}
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == deviceKey {
			k.device = a.Value.String()
		}
		return true
	})
	if h.watch != nil {
		h.watch(k.device, r)
	}
	h.limits.handle(k, entry{h.next, r.Clone()})
	return nil
}

// deviceKey is the attribute that is a part of the kind.
const deviceKey = "device"

// WithAttrs implements [slog.Handler].
func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *h
	with.next = h.next.WithAttrs(attrs)
	for _, a := range attrs {
		if a.Key == deviceKey {
			with.device = a.Value.String()
		}
	}
	return &with
}

// WithGroup implements [slog.Handler].
func (h *handler) WithGroup(name string) slog.Handler {
	with := *h
	with.next = h.next.WithGroup(name)
	return &with
}

// handle queues the first record of a kind, and counts the others.
func (l *limits) handle(k kind, e entry) {
	l.kindMu.Lock()
	defer l.kindMu.Unlock()
	if l.kinds[k] == nil && len(l.kinds) >= maxKinds {
		k = kind{} // the rest
	}
	if r := l.kinds[k]; r != nil {
		r.n, r.last = r.n+1, e
		return
	}
	r := &repeats{}
	r.next = time.AfterFunc(every, func() { l.tell(k, r) })
	l.kinds[k] = r
	l.put(e)
}

// tell queues what was counted of a kind, and forgets a kind of which nothing was.
func (l *limits) tell(k kind, r *repeats) {
	l.kindMu.Lock()
	defer l.kindMu.Unlock()
	switch {
	case l.kinds[k] != r: // told by tellAll
	case r.n == 0:
		delete(l.kinds, k)
	default:
		l.putCount(r)
		r.next.Reset(every)
	}
}

// tellAll queues what was counted, and begins anew.
func (l *limits) tellAll() {
	l.kindMu.Lock()
	defer l.kindMu.Unlock()
	for k, r := range l.kinds {
		r.next.Stop()
		delete(l.kinds, k)
		if r.n > 0 {
			l.putCount(r)
		}
	}
}

// putCount queues the last record of a kind, with the number of those that it stands for.
// kindMu is held.
func (l *limits) putCount(r *repeats) {
	r.last.record.AddAttrs(slog.Int("more", r.n))
	l.put(r.last)
	r.n, r.last = 0, entry{}
}

// put queues a record, if there is room. kindMu is held.
func (l *limits) put(e entry) {
	if len(l.waiting) >= maxWaiting {
		l.lost++
		return
	}
	l.waiting = append(l.waiting, l.withLoss(e)...)
	if l.idle == nil {
		l.idle = make(chan struct{})
		go l.pass()
	}
}

// withLoss precedes a record by one that says how many were lost before it. kindMu is held.
func (l *limits) withLoss(e entry) []entry {
	if l.lost == 0 {
		return []entry{e}
	}
	told := slog.NewRecord(time.Now(), slog.LevelWarn, "records of the log were lost here, since nobody took them", 0)
	told.AddAttrs(slog.Int("lost", l.lost))
	l.lost = 0
	return []entry{{e.to, told}, e}
}

// pass gives records to their handlers until none waits.
func (l *limits) pass() {
	for {
		l.kindMu.Lock()
		if len(l.waiting) == 0 {
			close(l.idle)
			l.idle, l.waiting = nil, nil
			l.kindMu.Unlock()
			return
		}
		e := l.waiting[0]
		l.waiting[0] = entry{}
		l.waiting = l.waiting[1:]
		l.kindMu.Unlock()
		_ = e.to.Handle(context.Background(), e.record) // of what cannot be logged nobody can be told
	}
}

// taken returns a channel that is closed when no record waits.
func (l *limits) taken() <-chan struct{} {
	l.kindMu.Lock()
	defer l.kindMu.Unlock()
	if l.idle != nil {
		return l.idle
	}
	none := make(chan struct{})
	close(none)
	return none
}
