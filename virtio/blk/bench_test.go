package blk

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/govmm/govmm/virtio/virtiotest"
)

// BenchmarkRequests carries out requests of one size with so many in flight.
func BenchmarkRequests(b *testing.B) {
	const size = 256 << 20
	path := newImage(b, size)
	for _, direct := range []bool{false, true} {
		d := open(b, Config{Path: path, Direct: direct})
		for _, kind := range []uint32{typeIn, typeOut} {
			for _, n := range []int{4 << 10, 256 << 10} {
				for _, depth := range []int{1, 16} {
					name := fmt.Sprintf("direct=%v/%s/%dK/depth=%d", direct, map[uint32]string{typeIn: "read", typeOut: "write"}[kind], n>>10, depth)
					b.Run(name, func(b *testing.B) { benchmark(b, d, kind, n, depth, size) })
				}
			}
		}
	}
}

func benchmark(b *testing.B, d *Device, kind uint32, n, depth, size int) {
	r := newRig(b, d, layouts["split event_idx"])
	rng := rand.New(rand.NewPCG(1, 1))
	slots := map[uint16]uint64{}
	send := func(gpa uint64) {
		sector := uint64(rng.IntN(size/n)) * uint64(n) / SectorSize
		req := r.send(0, gpa, kind, sector, virtiotest.Buffer{GPA: gpa + 4096, Len: uint32(n)}, kind == typeIn)
		slots[req.token] = gpa
	}
	b.SetBytes(int64(n))
	b.ReportAllocs()
	b.ResetTimer()
	sent := 0
	for ; sent < min(depth, b.N); sent++ {
		send(r.free + uint64(sent)*uint64(n+4096))
	}
	for range b.N {
		u := r.wait(0)
		if sent < b.N {
			send(slots[u.Token])
			sent++
		}
	}
	b.StopTimer()
	d.Reset()
}
