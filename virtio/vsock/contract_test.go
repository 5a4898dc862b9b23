package vsock

import (
	"encoding/binary"
	"math/rand/v2"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// A driver that keeps to no rule does not keep the device from being paused and
// reset.
func TestHostileDriver(t *testing.T) {
	var path string
	virtiotest.Hostile{
		New: func(t testing.TB, _ *virtiotest.Memory) virtio.Device {
			path = filepath.Join(t.TempDir(), "v")
			d, err := New(Config{CID: guestCID, Path: path}, nil)
			check(t, err)
			check(t, d.Listen())
			return d
		},
		Request: func(r *rand.Rand, queue int) []byte {
			h := header{
				SrcCID: guestCID, DstCID: hostCID, Type: typeStream, Op: uint16(r.IntN(9)),
				SrcPort: uint32(r.IntN(3)), DstPort: uint32(r.IntN(3)), BufAlloc: r.Uint32() >> r.IntN(32), FwdCnt: r.Uint32() >> r.IntN(32),
			}
			if r.IntN(8) == 0 {
				h.Len = r.Uint32() >> r.IntN(32)
			}
			var b [headerBytes]byte
			h.encode(&b)
			if r.IntN(50) == 0 {
				return b[:8]
			}
			return b[:]
		},
		Host: func(r *rand.Rand) {
			c, err := net.DialTimeout("unix", path, time.Second)
			if err != nil {
				return
			}
			_, _ = c.Write(binary.LittleEndian.AppendUint32([]byte("CONNECT 1\n"), r.Uint32()))
			if r.IntN(2) == 0 {
				_ = c.Close()
			} else {
				time.AfterFunc(time.Duration(r.IntN(20))*time.Millisecond, func() { _ = c.Close() })
			}
		},
	}.Attack(t)
}

// Each packet that is an error comes to an end: its queue can be reset.
func TestResetOfABrokenQueue(t *testing.T) {
	for queue, b := range map[int]virtiotest.Buffer{transmitQueue: {Len: 8}, receiveQueue: {Len: headerBytes}} {
		r := newBareRig(t, layouts["split"])
		b.GPA = r.free
		if queue == transmitQueue {
			r.add(queue, []virtiotest.Buffer{b}, nil)
		} else {
			r.add(queue, nil, []virtiotest.Buffer{b})
			dial(t, r.path).say("CONNECT 1\n")
		}
		r.needsReset()
		drained := make(chan struct{})
		go func() { r.queues[queue].Drain(); close(drained) }()
		select {
		case <-drained:
		case <-time.After(patience):
			t.Fatalf("the reset of queue %d does not come to an end", queue)
		}
	}
}
