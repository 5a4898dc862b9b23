package migrate

import (
	"context"
	"sync"
	"time"
)

// limiter spreads the bytes of all channels over time. A nil limiter has no limit.
type limiter struct {
	rate uint64          // bytes a second
	over <-chan struct{} // closed when there is no limit any more; nil: never

	mu   sync.Mutex // guards next
	next time.Time
}

// reserve books n bytes and returns when their time ends.
func (l *limiter) reserve(n uint64) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if l.next.Before(now) {
		l.next = now
	}
	l.next = l.next.Add(time.Duration(float64(n) / float64(l.rate) * float64(time.Second)))
	return l.next
}

// wait returns when the time of n more bytes has ended.
func (l *limiter) wait(ctx context.Context, n uint64) error {
	if l == nil || n == 0 {
		return nil
	}
	t := time.NewTimer(time.Until(l.reserve(n)))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-l.over:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
