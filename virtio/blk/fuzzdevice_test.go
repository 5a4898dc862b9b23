package blk

import (
	"encoding/binary"
	"os"
	"testing"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/transport/transporttest"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// FuzzDevice is a guest that does anything with the disk's registers and rings.
func FuzzDevice(f *testing.F) {
	if _, err := os.Stat("/dev/shm"); err == nil {
		f.Setenv("TMPDIR", "/dev/shm") // a flush waits for no disk
	}
	request := func(kind uint32, sector uint64, more ...byte) []byte {
		b := binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint32(nil, kind), sector<<32)
		return append(append(b, 0, 0, 0, 0), more...)
	}
	discard := make([]byte, rangeSize)
	discard[0], discard[8] = 3, 4
	transporttest.Fuzz(f, transporttest.Device{
		New: func(t testing.TB, _ *virtiotest.Memory) virtio.Device {
			d, err := Open(Config{Path: newImage(t, 64<<10), Queues: 2}, nil)
			if err != nil {
				t.Fatal(err)
			}
			return d
		},
		Requests: []transporttest.Request{
			{Queue: 0, Readable: request(typeIn, 1), Writable: 9},
			{Queue: 1, Readable: request(typeOut, 2, make([]byte, 200)...), Writable: 1},
			{Queue: 0, Readable: request(typeFlush, 0), Writable: 1},
			{Queue: 1, Readable: request(typeGetID, 0), Writable: 1},
			{Queue: 0, Readable: request(typeDiscard, 0, discard...), Writable: 1},
			{Queue: 0, Readable: request(typeWriteZeroes, 0, discard...), Writable: 1},
		},
	})
}
