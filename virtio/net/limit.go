package net

import (
	"time"

	"github.com/govmm/govmm/virtio"
)

// minCost is what a frame counts at least, in bytes: Ethernet has none that are shorter.
const minCost = 60

// server is what a sender does with its queue. A device without a limit asks nobody.
func (s *sender) server(q *virtio.Queue) virtio.Server {
	server := virtio.Server{Queue: q, Serve: s.serve}
	if f, ok := s.port.(flusher); ok {
		server.Empty = func([]virtio.Chain, []uint32) int { f.Flush(); return virtio.Keep }
	}
	if l := s.d.fromGuest; l != nil {
		server.Ready = func() time.Duration {
			wait := l.Wait()
			if wait > 0 {
				flush(s.port)
			}
			return wait
		}
		server.Serve = func(c *virtio.Chain) (uint32, error) {
			// A frame that will be dropped counts, too.
			l.Spend(1, max(min(c.ReadableLen()-HeaderBytes, maxFrame), minCost))
			return s.serve(c)
		}
	}
	return server
}

// wait is how long the guest may get no further frame. Meanwhile frames wait in the host,
// or are dropped there.
func (r *receiver) wait() time.Duration {
	if r.d.toGuest == nil {
		return 0
	}
	return r.d.toGuest.Wait()
}
