package balloon_test

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// slow takes that long to give memory back.
type slow time.Duration

func (s slow) Punch(uint64, uint64) error { time.Sleep(time.Duration(s)); return nil }

// A driver that keeps to no rule does not keep the device from being paused and
// reset.
func TestHostileDriver(t *testing.T) {
	var b *balloon.Balloon
	virtiotest.Hostile{
		New: func(t testing.TB, mem *virtiotest.Memory) virtio.Device {
			var err error
			b, err = balloon.New(balloon.Config{Memory: mem, Puncher: slow(20 * time.Microsecond), RAM: ramBytes})
			check(t, err)
			b.SetHintSink(&sink{})
			return b
		},
		Request: func(r *rand.Rand, queue int) []byte {
			p := make([]byte, 4+4*r.IntN(2)*r.IntN(5000))
			for at := 0; at < len(p); at += 4 {
				v := 0x100 + uint32(r.IntN(0x100)) // the number of a page of RAM
				if queue == hint {
					v = uint32(r.IntN(8))
				}
				binary.LittleEndian.PutUint32(p[at:], v)
			}
			if queue == hint && r.IntN(20) > 0 {
				return p[:4]
			}
			return p[:len(p)-r.IntN(200)/199]
		},
		Host: func(r *rand.Rand) {
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			_, _ = b.PollStats(ctx)
			if id, err := b.NewHintID(); err == nil && r.IntN(2) == 0 {
				b.AnnounceHints(id)
			}
			switch r.IntN(3) {
			case 0:
				b.StopHints()
			case 1:
				b.DoneHints()
			}
			check(t, b.SetTarget(uint64(r.IntN(4))<<20))
		},
	}.Attack(t)
}

// However many pages a request names, a pause does not wait for them: the
// request comes back and the rest stays where it is.
func TestPauseInsideOfARequest(t *testing.T) {
	for queue, each := range map[int]slow{inflate: slow(20 * time.Microsecond), report: slow(100 * time.Millisecond)} {
		r := newRig(t, allOf)
		r.b.Reset()
		b, err := balloon.New(balloon.Config{Memory: r.mem, Puncher: each, RAM: ramBytes})
		check(t, err)
		for i := range queues {
			r.queues[i].Stop()
			r.drivers[i] = virtiotest.NewDriver(t, r.mem.ring, ramBytes+uint64(i)*virtiotest.RingBytes(queueSize), queueSize, r.features)
			r.drivers[i].Start(r.queues[i])
		}
		check(t, b.Activate(r.features, r.queues, r))
		t.Cleanup(b.Reset)
		// Requests of 100000 pages that are not next to each other, or of 64 that
		// take 100 ms: more than 5 s each.
		var p []byte
		for i := range uint32(100000) {
			p = binary.LittleEndian.AppendUint32(p, 2*(i%2000))
		}
		check(t, r.mem.WriteAt(p, r.data))
		for range 8 {
			if queue == inflate {
				r.send(queue, []virtiotest.Buffer{{GPA: r.data, Len: uint32(len(p))}}, nil)
				continue
			}
			r.drivers[queue].Indirect = true
			var pages []virtiotest.Buffer
			for i := range uint64(virtiotest.MaxIndirect) {
				pages = append(pages, virtiotest.Buffer{GPA: i * 8192, Len: 4096})
			}
			r.send(queue, nil, pages)
		}
		for {
			if _, err := r.queues[queue].SaveState(); errors.Is(err, virtio.ErrInFlight) {
				break
			}
		}
		begin := time.Now()
		check(t, b.Pause(ctx(t)))
		if took := time.Since(begin); took > 4*time.Second {
			t.Errorf("queue %d: paused after %v", queue, took)
		}
		_, err = r.queues[queue].SaveState()
		check(t, err)
		check(t, b.Resume())
		for { // the end is as quick
			if _, err := r.queues[queue].SaveState(); errors.Is(err, virtio.ErrInFlight) {
				break
			}
		}
		begin = time.Now()
		b.Reset()
		if took := time.Since(begin); took > 4*time.Second {
			t.Errorf("queue %d: reset after %v", queue, took)
		}
	}
}
