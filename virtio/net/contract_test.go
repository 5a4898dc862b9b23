package net_test

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/virtiotest"
	"golang.org/x/sys/unix"
)

// A driver that keeps to no rule does not keep the device from being paused and
// reset.
func TestHostileDriver(t *testing.T) {
	var w *wire
	virtiotest.Hostile{
		New: func(t testing.TB, _ *virtiotest.Memory) virtio.Device {
			w = newWire(t, 2)
			d, err := net.New(net.Config{Backend: w, MAC: guestMAC, MTU: 1500})
			check(t, err)
			return d
		},
		Request: func(r *rand.Rand, queue int) []byte {
			if queue == 4 {
				commands := [][]byte{{1, 1, 2, 0, 0, 0, 0, 1}, {3, 0}, {4, 0, byte(r.IntN(4)), 0}, {5, 0}}
				p := commands[r.IntN(len(commands))]
				if p[0] == 5 {
					p = binary.LittleEndian.AppendUint64(p, offloads>>r.IntN(3))
				}
				return p
			}
			return frame(14 + r.IntN(2000))
		},
		Host: func(r *rand.Rand) {
			for range 1 + r.IntN(4) {
				_, _ = unix.Write(w.peers[r.IntN(2)], frame(14+r.IntN(60000)))
			}
		},
	}.Attack(t)
}

// A merge buffer outside of RAM behind one inside comes to an end: the queue
// can be reset.
func TestResetOfABrokenReceiveQueue(t *testing.T) {
	r := newRig(t, 1, plain)
	r.add(0, nil, []virtiotest.Buffer{{GPA: r.data, Len: 100}})
	r.add(0, nil, []virtiotest.Buffer{{GPA: 1 << 40, Len: 100}})
	r.wire.inject(t, 0, frame(150))
	<-r.broken
	drained := make(chan struct{})
	go func() { r.queues[0].Drain(); close(drained) }()
	select {
	case <-drained:
	case <-time.After(10 * time.Second):
		t.Fatal("the reset of the queue does not come to an end")
	}
}
