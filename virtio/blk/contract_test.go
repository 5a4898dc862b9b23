package blk

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// A driver that keeps to no rule does not keep the device from being paused and
// reset.
func TestHostileDriver(t *testing.T) {
	virtiotest.Hostile{
		New: func(t testing.TB, _ *virtiotest.Memory) virtio.Device {
			d, err := Open(Config{Path: newImage(t, 1<<20), Queues: 2}, nil)
			if err != nil {
				t.Fatal(err)
			}
			return d
		},
		Request: func(r *rand.Rand, _ int) []byte {
			kinds := []uint32{typeIn, typeOut, typeFlush, typeGetID, typeDiscard, typeWriteZeroes, 99}
			b := make([]byte, headerSize+r.IntN(3)*rangeSize)
			binary.LittleEndian.PutUint32(b, kinds[r.IntN(len(kinds))])
			binary.LittleEndian.PutUint64(b[8:], r.Uint64()>>(53-r.IntN(3)))
			for at := headerSize; at < len(b); at += rangeSize {
				binary.LittleEndian.PutUint64(b[at:], r.Uint64()>>53)
				binary.LittleEndian.PutUint32(b[at+8:], r.Uint32()>>(22-r.IntN(3)))
				binary.LittleEndian.PutUint32(b[at+12:], uint32(r.IntN(3)/2))
			}
			return b[:len(b)-r.IntN(40)/39]
		},
	}.Attack(t)
}

// A request of more than drivers put into one is an error.
func TestHugeRequests(t *testing.T) {
	d := open(t, Config{Path: newImage(t, 2*maxTransfer)})
	r := newRig(t, d, layouts["split"])
	for _, in := range []bool{true, false} {
		kind := uint32(typeOut)
		if in {
			kind = typeIn
		}
		status, _ := r.do(kind, 0, maxTransfer, in)
		want(t, "the largest", status, statusOK)
		status, _ = r.do(kind, 0, maxTransfer+SectorSize, in)
		want(t, "larger", status, statusIOErr)
	}
}
