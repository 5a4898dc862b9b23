package vsock

import (
	"fmt"
	"net"
	"path/filepath"
	"testing"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/transport/transporttest"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// FuzzDevice is a guest that does anything with the registers and rings of the socket
// device, and opens, answers and breaks connections, while programs of the host come,
// talk and go.
func FuzzDevice(f *testing.F) {
	var path string
	packet := func(op uint16, guestPort, hostPort uint32, payload string) []byte {
		h := header{SrcCID: guestCID, DstCID: hostCID, Type: typeStream, Op: op, SrcPort: guestPort, DstPort: hostPort, BufAlloc: 4096, Len: uint32(len(payload))}
		var b [headerBytes]byte
		h.encode(&b)
		return append(b[:], payload...)
	}
	transporttest.Fuzz(f, transporttest.Device{
		New: func(t testing.TB, _ *virtiotest.Memory) virtio.Device {
			path = filepath.Join(t.TempDir(), "v")
			ln, err := net.Listen("unix", path+"_5")
			check(t, err)
			t.Cleanup(func() { ln.Close() })
			d, err := New(Config{CID: guestCID, Path: path}, nil)
			check(t, err)
			check(t, d.Listen())
			return d
		},
		Host: func(t testing.TB, _ virtio.Device, what byte, value uint16) {
			c, err := net.Dial("unix", path)
			if err != nil {
				return // too many wait to be accepted
			}
			t.Cleanup(func() { c.Close() })
			_, _ = fmt.Fprintf(c, "CONNECT %d\n%*d", what, value&0xfff, 1)
			if value&0x8000 != 0 {
				_ = c.Close()
			}
		},
		Requests: []transporttest.Request{
			{Queue: 0, Writable: 8},
			{Queue: 1, Readable: packet(opRequest, 9, 5, "")},
			{Queue: 1, Readable: packet(opData, 9, 5, "hello")},
			{Queue: 0, Writable: 64},
			{Queue: 1, Readable: packet(opShutdown, 9, 5, "")},
			{Queue: 1, Readable: packet(opReset, 9, 5, "")},
		},
	})
}
