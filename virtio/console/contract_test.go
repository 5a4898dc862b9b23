package console

import (
	"math/rand/v2"
	"testing"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// stuck takes a Write now and then.
type stuck struct{ next chan struct{} }

func (s stuck) Write(p []byte) (int, error) { <-s.next; return len(p), nil }

// A driver that keeps to no rule, before a terminal that hardly reads, does not
// keep the device from being paused and reset.
func TestHostileDriver(t *testing.T) {
	var d *Device
	w := stuck{make(chan struct{}, 1)}
	virtiotest.Hostile{
		New: func(t testing.TB, _ *virtiotest.Memory) virtio.Device {
			w = stuck{make(chan struct{}, 1)}
			d = New(Config{}, w)
			return closer{d, w}
		},
		Host: func(r *rand.Rand) {
			signal(w.next)
			d.Feed(make([]byte, r.IntN(5000)))
			d.SetSize(uint16(r.IntN(3)), 1)
		},
	}.Attack(t)
}

// closer ends a Write that is stuck before it closes the console.
type closer struct {
	*Device
	w stuck
}

func (c closer) Close() error { close(c.w.next); return c.Device.Close() }
