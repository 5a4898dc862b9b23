package console

import (
	"io"
	"testing"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/transport/transporttest"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// FuzzDevice is a guest that does anything with the console's registers and rings,
// while its terminal types and changes its size.
func FuzzDevice(f *testing.F) {
	transporttest.Fuzz(f, transporttest.Device{
		New: func(testing.TB, *virtiotest.Memory) virtio.Device { return New(Config{}, io.Discard) },
		Host: func(_ testing.TB, d virtio.Device, what byte, value uint16) {
			if what&1 != 0 {
				d.(*Device).SetSize(value, uint16(what))
				return
			}
			d.(*Device).Feed(make([]byte, value&0xfff))
		},
		Requests: []transporttest.Request{{Queue: 0, Writable: 2}, {Queue: 1, Readable: []byte("hello")}, {Queue: 0, Writable: 1}},
	})
}
