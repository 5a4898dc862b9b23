package migrate

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
)

// slowDisks is a source whose disks are being flushed until the test says so.
type slowDisks struct {
	*toySource
	flushed chan struct{}
}

func (s slowDisks) PrepareStop(ctx context.Context) error {
	select {
	case <-s.flushed:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Rounds of nothing are paced, and the bandwidth stays what round 0 has measured.
func TestRoundsOfNothingArePaced(t *testing.T) {
	const pages = 600 // enough to tell the bandwidth
	rig := newRigOf(t, defaultPeerTimeout, pages*mempage.Size)
	rig.src.mem[0] = bytes.Repeat([]byte{1}, pages*mempage.Size)
	src := slowDisks{rig.src, make(chan struct{})}
	m := New(src, rig.addr, Options{})
	var pauses []time.Duration
	var bandwidth []uint64
	m.clock.after = func(d time.Duration) <-chan time.Time {
		if pauses = append(pauses, d); len(pauses) == 50 {
			close(src.flushed)
		}
		bandwidth = append(bandwidth, m.Progress().BandwidthBytes)
		fired := make(chan time.Time, 1)
		fired <- time.Time{}
		return fired
	}
	if _, err := m.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	<-rig.recv.Arrived()
	r := m.Result()
	// Of two pauses one is for a flush that might end soon.
	if len(r.Rounds) < 20 || len(r.Rounds) > 30 {
		t.Errorf("%d rounds with %d pauses", len(r.Rounds), len(pauses))
	}
	for i, d := range pauses {
		if i > 15 && i < 50 && d != longPause && d != shortPause || d < shortPause {
			t.Errorf("pause %d: %v", i, d)
		}
	}
	for _, b := range bandwidth[1:] {
		if b != bandwidth[1] || b == 0 {
			t.Fatalf("the bandwidth of round 0 does not stay: %v", bandwidth)
		}
	}
}

// A flush counts for a while, and is made again while that makes it shorter.
func TestFlushesFollowEachOther(t *testing.T) {
	now := time.Unix(1000, 0)
	broken := errors.New("broken on purpose")
	for name, c := range map[string]struct {
		took  []time.Duration
		fails error
	}{
		"little is dirty":   {took: []time.Duration{30 * time.Millisecond}},
		"much, then little": {took: []time.Duration{11 * time.Second, time.Second, 30 * time.Millisecond}},
		"never clean":       {took: []time.Duration{600 * time.Millisecond, 590 * time.Millisecond}},
		"slowly shrinking":  {took: []time.Duration{64 * time.Second, 31 * time.Second, 15 * time.Second, 7 * time.Second, 3 * time.Second}},
		"an error":          {took: []time.Duration{time.Second}, fails: broken},
	} {
		t.Run(name, func(t *testing.T) {
			f := flushing{src: flushFunc(func() error { return c.fails }), clock: clock{now: func() time.Time { return now }}}
			defer f.end()
			for i, took := range c.took {
				if ready, err := f.ready(50*time.Millisecond, now); ready || err != nil {
					t.Fatalf("ready before flush %d: %v", i, err)
				}
				f.start(t.Context())
				f.start(t.Context()) // does nothing
				<-f.done()
				now = now.Add(took)
			}
			ready, err := f.ready(50*time.Millisecond, now)
			if ready == (c.fails != nil) || !errors.Is(err, c.fails) {
				t.Errorf("ready: %v, %v", ready, err)
			}
			round := now
			now = now.Add(max(flushFresh, 2*f.took) + 1)
			if again, err := f.ready(50*time.Millisecond, round); again != ready || err != nil {
				t.Errorf("after a long round: ready %v, %v", again, err)
			}
			if ready, err := f.ready(time.Hour, now); ready || err != nil {
				t.Errorf("an old flush: ready %v, %v", ready, err)
			}
		})
	}
}

type flushFunc func() error

func (f flushFunc) PrepareStop(context.Context) error { return f() }
