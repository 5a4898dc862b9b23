// Package limit holds what a guest's device does to a rate that its host has set.
//
// A device asks [Limiter.Ready] before it takes a request, and says afterwards, by
// [Limiter.Spend], what the request counts. So a request that has to wait is still in
// its queue: nothing is out while a device waits, and a pause, a saved state and a reset
// need not wait for a limit. A request of any size passes, and those behind it wait
// until it is paid for.
package limit

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/govmm/govmm/internal/units"
	"golang.org/x/time/rate"
)

const (
	// MinBurst is the smallest burst of bytes: a large request is paid in parts of a
	// burst, and these should be few.
	MinBurst = 64 << 10
	// maxRate keeps rates and bursts within what a float64 counts exactly.
	maxRate = 1 << 50
	// admission is how long a request that was let through may take to say what it
	// counts, before another one is.
	admission = 50 * time.Microsecond
	// longest is how long a wait may be before the limit is looked at again.
	longest = time.Hour
)

// Rates are the limits of a device. They belong to a host: they do not travel with a
// guest, which cannot see them either. 0 is no limit.
type Rates struct {
	// BPS is how many bytes a second pass. BPSBurst is how many pass at once after
	// a time in which few did, at least [MinBurst]; 0: those of a tenth of a second,
	// or MinBurst.
	BPS, BPSBurst uint64
	// IOPS and IOPSBurst say the same of operations; the smallest burst is 1.
	IOPS, IOPSBurst uint64
}

// Set takes an option, as in bps=10M, and reports whether it is one of rates.
func (r *Rates) Set(key, value string) (known bool, err error) {
	field := r.field(key)
	if field == nil {
		return false, nil
	}
	parse, example := units.ParseBytes, "10M"
	if strings.HasPrefix(key, "iops") {
		parse, example = parseCount, "500"
	}
	n, err := parse(strings.TrimSuffix(value, "/s"))
	if err != nil || n < 1 || n > maxRate {
		return true, fmt.Errorf("%s=%s: expected a whole number between 1 and 2^50, as in %s", key, value, example)
	}
	*field = n
	return true, nil
}

func parseCount(s string) (uint64, error) { return strconv.ParseUint(s, 10, 64) }

func (r *Rates) field(key string) *uint64 {
	switch key {
	case "bps":
		return &r.BPS
	case "bps-burst":
		return &r.BPSBurst
	case "iops":
		return &r.IOPS
	case "iops-burst":
		return &r.IOPSBurst
	}
	return nil
}

// Validate reports values that make no limit.
func (r Rates) Validate() error {
	switch {
	case max(r.BPS, r.BPSBurst, r.IOPS, r.IOPSBurst) > maxRate:
		return fmt.Errorf("rates and bursts must be at most %d", uint64(maxRate))
	case r.BPS == 0 && r.BPSBurst != 0:
		return fmt.Errorf("bps-burst= needs bps=")
	case r.IOPS == 0 && r.IOPSBurst != 0:
		return fmt.Errorf("iops-burst= needs iops=")
	case r.BPSBurst != 0 && r.BPSBurst < MinBurst:
		return fmt.Errorf("bps-burst= must be at least %d, got %d", MinBurst, r.BPSBurst)
	}
	return nil
}

// String is the options from which Set makes r, with a comma before each.
func (r Rates) String() string {
	s := ""
	for _, key := range []string{"bps", "bps-burst", "iops", "iops-burst"} {
		if n := *r.field(key); n != 0 {
			s += "," + key + "=" + strconv.FormatUint(n, 10)
		}
	}
	return s
}

// Describe is the rates for people; "" if there is no limit.
func (r Rates) Describe() string {
	var all []string
	if r.BPS != 0 {
		all = append(all, units.Bytes(r.BPS)+"/s")
	}
	if r.IOPS != 0 {
		all = append(all, fmt.Sprintf("%d operations/s", r.IOPS))
	}
	if all == nil {
		return ""
	}
	return "at most " + strings.Join(all, ", ")
}

// Limiter keeps users of it together to rates.
type Limiter struct {
	bytes, ops *rate.Limiter // nil: no limit

	admitting sync.Mutex // guards all below
	next      time.Time  // before it nobody is let through, except after Spend
}

// Limiter returns a limiter; nil if there is no limit.
func (r Rates) Limiter() *Limiter {
	if r.BPS == 0 && r.IOPS == 0 {
		return nil
	}
	l := &Limiter{}
	if r.BPS != 0 {
		l.bytes = bucket(r.BPS, r.BPSBurst, MinBurst)
	}
	if r.IOPS != 0 {
		l.ops = bucket(r.IOPS, r.IOPSBurst, 1)
	}
	return l
}

// bucket makes a limit of n a second. Without a burst it is a tenth of a second's, and
// at least least.
func bucket(n, burst, least uint64) *rate.Limiter {
	if burst == 0 {
		burst = max(n/10, least)
	}
	return rate.NewLimiter(rate.Limit(n), int(burst))
}

// Ready returns 0 if a request may be taken now, or how long to wait. It implements
// Ready of a virtio.Server. Requests are let through one by one: who was let through
// calls Spend at once, without anything to count if there is no request.
func (l *Limiter) Ready() time.Duration {
	l.admitting.Lock()
	defer l.admitting.Unlock()
	now := time.Now()
	wait := max(l.debt(now), l.next.Sub(now), 0)
	if wait == 0 {
		l.next = now.Add(admission)
	}
	return wait
}

// Wait returns how long to wait until all that was spent is paid for.
func (l *Limiter) Wait() time.Duration { return l.debt(time.Now()) }

func (l *Limiter) debt(now time.Time) time.Duration { return max(debt(l.bytes, now), debt(l.ops, now)) }

// debt is the time until all that was spent is paid for.
func debt(b *rate.Limiter, now time.Time) time.Duration {
	if b == nil {
		return 0
	}
	owed := -b.TokensAt(now)
	if owed < 0.5 {
		return 0
	}
	wait := math.Ceil(owed / float64(b.Limit()) * float64(time.Second))
	return time.Duration(min(wait, float64(longest)))
}

// Spend counts a request that was taken. A nil Limiter counts nothing.
func (l *Limiter) Spend(ops, bytes int) {
	if l == nil {
		return
	}
	l.admitting.Lock()
	defer l.admitting.Unlock()
	now := time.Now()
	spend(l.ops, ops, now)
	spend(l.bytes, bytes, now)
	l.next = time.Time{}
}

// spend reserves n, in parts: no reservation is larger than the burst.
func spend(b *rate.Limiter, n int, now time.Time) {
	for b != nil && n > 0 {
		part := min(n, b.Burst())
		b.ReserveN(now, part)
		n -= part
	}
}
