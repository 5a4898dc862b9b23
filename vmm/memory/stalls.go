package memory

import (
	"math/bits"
	"slices"
	"time"
)

// Stalls is how long threads stood still for missing pages. vCPUs are such threads.
type Stalls struct {
	Faults  uint64                   // on missing pages
	Local   uint64                   // on pages that do not exist and are not missing, answered here
	Longest time.Duration            // from the fault's report until the page had come
	Total   time.Duration            // of all faults
	Threads map[uint32]time.Duration // by thread id: the sum of its faults
	// Buckets counts faults by their time: bucket i those of less than 2^i microseconds, and
	// not less than half of that.
	Buckets [32]uint64
}

// maxThreads bounds Stalls.Threads: kernel threads fault for vCPUs, too.
const maxThreads = 1 << 12

func (s *Stalls) add(f waiter, now time.Time) {
	d := now.Sub(f.since)
	s.Faults++
	s.Total += d
	s.Longest = max(s.Longest, d)
	if _, ok := s.Threads[f.thread]; ok || len(s.Threads) < maxThreads {
		s.Threads[f.thread] += d
	}
	s.Buckets[min(bits.Len64(uint64(max(d.Microseconds(), 0))), len(s.Buckets)-1)]++
}

// Quantile returns a time that so many of the faults did not exceed, to a power of two
// microseconds, but no more than the longest one.
func (s *Stalls) Quantile(q float64) time.Duration {
	want, seen := uint64(q*float64(s.Faults)), uint64(0)
	for i, n := range s.Buckets {
		if seen += n; n > 0 && seen > want {
			return min(time.Duration(1<<i)*time.Microsecond, s.Longest)
		}
	}
	return s.Longest
}

// Stalls returns what there has been so far.
func (x *Missing) Stalls() Stalls {
	x.waitMu.Lock()
	defer x.waitMu.Unlock()
	s := x.stalls
	s.Threads = map[uint32]time.Duration{}
	for id, d := range x.stalls.Threads {
		s.Threads[id] = d
	}
	return s
}

// Waiting returns how many threads wait for a missing page now, and since when the first
// of them does.
func (x *Missing) Waiting() (n int, since time.Time) {
	x.waitMu.Lock()
	defer x.waitMu.Unlock()
	for _, list := range x.waiting {
		n += len(list)
		first := slices.MinFunc(list, func(a, b waiter) int { return a.since.Compare(b.since) })
		if since.IsZero() || first.since.Before(since) {
			since = first.since
		}
	}
	return n, since
}

func (x *Missing) stallsZero() {
	x.waitMu.Lock()
	defer x.waitMu.Unlock()
	x.stalls.Local++
}
