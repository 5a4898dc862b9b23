package balloon_test

import (
	"context"
	"testing"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/transport/transporttest"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// puncher gives back pages of memory that must be RAM.
type puncher struct {
	t   testing.TB
	mem *virtiotest.Memory
}

func (p puncher) Punch(gpa, n uint64) error {
	b, err := p.mem.Slice(gpa, n)
	if err != nil || gpa%4096 != 0 || n%4096 != 0 {
		p.t.Errorf("gives back [%#x,%#x): %v", gpa, gpa+n, err)
		return err
	}
	clear(b)
	return p.mem.MarkDirty(gpa, n)
}

// FuzzDevice is a guest that does anything with the balloon's registers and rings,
// while the host changes the target, wants statistics, and asks for hints.
func FuzzDevice(f *testing.F) {
	transporttest.Fuzz(f, transporttest.Device{
		New: func(t testing.TB, mem *virtiotest.Memory) virtio.Device {
			b, err := balloon.New(balloon.Config{Memory: mem, Puncher: puncher{t, mem}, RAM: transporttest.Base + transporttest.Size})
			check(t, err)
			b.SetHintSink(&sink{})
			return b
		},
		Host: func(_ testing.TB, d virtio.Device, what byte, value uint16) {
			b := d.(*balloon.Balloon)
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			switch what % 5 {
			case 0:
				_ = b.SetTarget(uint64(value) << 12) // too much is refused
			case 1:
				_, _ = b.PollStats(ctx) // no answer within no time
			case 2:
				if id, err := b.NewHintID(); err == nil {
					b.AnnounceHints(id)
				}
			case 3:
				b.StopHints()
			case 4:
				b.DoneHints()
			}
		},
		Requests: []transporttest.Request{
			{Queue: inflate, Readable: []byte{0x30, 1, 0, 0, 0x31, 1, 0, 0}},
			{Queue: deflate, Readable: []byte{0x31, 1, 0, 0}},
			{Queue: stats, Readable: []byte{4, 0, 1, 2, 3, 4, 5, 6, 7, 8}},
			{Queue: hint, Readable: []byte{2, 0, 0, 0}},
			{Queue: hint, Writable: 128},
			{Queue: report, Writable: 192},
		},
	})
}
