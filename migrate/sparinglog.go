package migrate

import (
	"log/slog"
	"net"
	"sync"
	"time"
)

// sparingLog logs the first warning of a kind at once, and then one line in a while that
// counts those of the same kind since: whoever can connect must not be able to fill a log.
type sparingLog struct {
	log   *slog.Logger
	while time.Duration

	mu    sync.Mutex // guards kinds
	kinds map[string]*repeats
}

// repeats are the warnings of a kind that have not been logged.
type repeats struct {
	n    int
	msg  string
	peer net.Addr // of the last one, as is why
	why  string
	next *time.Timer
}

// maxKinds bounds the kinds. Further ones count as one.
const maxKinds = 16

func newSparingLog(log *slog.Logger) *sparingLog {
	return &sparingLog{log: log, while: time.Minute, kinds: map[string]*repeats{}}
}

// warn logs, or counts. A kind is a message and a reason.
func (l *sparingLog) warn(msg string, peer net.Addr, err error) {
	why := clip(err.Error())
	if l.first(msg, peer, why) {
		l.log.Warn(msg, "peer", peer, "err", why)
	}
}

// first counts a warning. It returns true for the first of its kind.
func (l *sparingLog) first(msg string, peer net.Addr, why string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	key := msg + ": " + why
	if l.kinds[key] == nil && len(l.kinds) >= maxKinds {
		key = "" // the rest
	}
	if r := l.kinds[key]; r != nil {
		r.n, r.msg, r.peer, r.why = r.n+1, msg, peer, why
		return false
	}
	r := &repeats{}
	r.next = time.AfterFunc(l.while, func() { l.tell(key, r) })
	l.kinds[key] = r
	return true
}

// tell logs what has been counted of a kind, and forgets a kind of which nothing has.
func (l *sparingLog) tell(key string, r *repeats) {
	l.mu.Lock()
	told := *r
	r.n = 0
	if told.n > 0 {
		r.next.Reset(l.while)
	} else if l.kinds[key] == r {
		delete(l.kinds, key)
	}
	l.mu.Unlock()
	if told.n > 0 {
		l.log.Warn(told.msg, "more", told.n, "peer", told.peer, "err", told.why)
	}
}

// end logs what has been counted, and begins anew.
func (l *sparingLog) end() {
	l.mu.Lock()
	kinds := l.kinds
	l.kinds = map[string]*repeats{}
	for _, r := range kinds {
		r.next.Stop()
	}
	l.mu.Unlock()
	for key, r := range kinds {
		l.tell(key, r)
		r.next.Stop() // tell has set it again
	}
}
