package migrate

import (
	"math/rand/v2"
	"net"
	"runtime"
	"testing"

	"github.com/govmm/govmm/mempage"
)

// What compression takes of a host follows from its processors and the channels, and is
// bounded by both.
func TestCompressors(t *testing.T) {
	for _, tt := range []struct{ processors, channels, workers, atOnce int }{
		{1, 1, 2, 1},
		{2, 1, 2, 1},
		{2, 2, 3, 1},
		{4, 2, 4, 2},
		{64, 2, 4, 32},
		{64, 16, 32, 32},
		{8, 16, 20, 4},
		{512, 1, 2, 256},
	} {
		workers, atOnce := compressors(tt.processors, tt.channels)
		if workers != tt.workers || atOnce != tt.atOnce {
			t.Errorf("%d processors, %d channels: %d workers, %d of them compress; expected %d, %d",
				tt.processors, tt.channels, workers, atOnce, tt.workers, tt.atOnce)
		}
	}
}

// On a host of 64 processors the buffers of all workers, in use, take at most 16 MiB a
// channel.
func TestCompressionTakesLittleMemory(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(64))
	span := make([]byte, packSpan*mempage.Size)
	r := rand.NewChaCha8([32]byte{1})
	for at := 0; at < len(span); at += 3 << 10 { // a third of it
		_, _ = r.Read(span[at:min(at+1<<10, len(span))])
	}
	data := mempage.NewBitmap(packSpan)
	data.SetRange(0, packSpan)
	for _, c := range []Compression{CompressZstd, CompressLZ4} {
		const channels = 2
		heap := func() uint64 {
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			return m.HeapAlloc
		}
		ram := newPlainRAM(packSpan)
		tr, err := newTracker(ram.slots, &plainLog{slots: ram.slots}, defaultClearBitmapShift)
		if err != nil {
			t.Fatal(err)
		}
		l := &link{}
		for i := range channels {
			a, b := net.Pipe()
			defer a.Close()
			defer b.Close()
			l.data = append(l.data, newLane(i+1, newConn(a)))
		}
		before := heap()
		s, err := newSender(ram, tr, l, &meter{}, Options{Compression: c}.withDefaults())
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range s.workers {
			for range 3 {
				if packed, err := w.packer.pack(span, data); err != nil || packed == nil {
					t.Fatalf("%s: %d bytes, %v", c, len(packed), err)
				}
			}
		}
		took := heap() - before
		t.Logf("%s: %d workers, %d of them compress at one time, %d KiB", c, len(s.workers), cap(s.packing), took>>10)
		if took > channels*16<<20 {
			t.Errorf("%s: %d workers take %d KiB", c, len(s.workers), took>>10)
		}
		if cap(s.packing) != 32 || s.batch != packSpan {
			t.Errorf("%s: %d compress at one time, spans of %d pages", c, cap(s.packing), s.batch)
		}
		runtime.KeepAlive(s)
	}
}
