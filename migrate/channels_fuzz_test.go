package migrate

import (
	"bytes"
	"context"
	"io"
	"sync"
	"testing"

	"github.com/govmm/govmm/mempage"
)

// serveChannels lets a receiver read control after CONFIG, and the bytes of two data
// channels.
func serveChannels(t testing.TB, control []byte, data [2][]byte) *heapTarget {
	h := goodHello()
	h.dataChannels = 2
	first := new(stream).hello(h).config("config", knownFeatures...).Bytes()
	target := serveTarget(t, []DiskCopy{&heapDisk{b: make([]byte, 3*BlockSize+512)}}, append(first, control...), data[:]...)
	if !target.started && !target.discarded {
		t.Error("no machine arrived, and none was discarded")
	}
	return target
}

// heapDisk is a disk that is copied to memory.
type heapDisk struct {
	mu sync.Mutex
	b  []byte
}

func (d *heapDisk) Number() int  { return 0 }
func (d *heapDisk) Size() uint64 { return uint64(len(d.b)) }
func (d *heapDisk) Sync() error  { return nil }
func (d *heapDisk) Zero(off, n uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.b[off : off+n]) // panics outside
	return nil
}

func (d *heapDisk) Reserve(off, n uint64) error {
	_ = d.b[off : off+n]
	return nil
}

func (d *heapDisk) Write(p []byte, off uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.b[off:off+uint64(len(p))], p)
	return nil
}

// Blocks are taken inside of the disk, and nothing else is.
func TestDestinationChecksBlocks(t *testing.T) {
	last := round(0, flagLast)
	for _, c := range []struct {
		h    header
		n    int
		good bool
	}{
		{header{typ: frameBlocks, first: 3, count: 1}, 512, true},
		{header{typ: frameBlocks, count: 4}, 3*BlockSize + 512, true},
		{header{typ: frameBlocks, count: 4, flags: flagZero}, 0, true},
		{header{typ: frameBlocks, first: 1, count: 3, flags: flagReserve}, 0, true},
		{header{typ: frameBlocks, first: 3, count: 1}, BlockSize, false},
		{header{typ: frameBlocks, first: 3, count: 2, flags: flagZero}, 0, false},
		{header{typ: frameBlocks, first: 4, count: 1, flags: flagZero}, 0, false},
		{header{typ: frameBlocks, first: 1 << 63, count: 1 << 31, flags: flagReserve}, 0, false},
		{header{typ: frameBlocks, flags: flagZero}, 0, false},
		{header{typ: frameBlocks, count: 1, flags: flagZero}, 5, false},
		{header{typ: frameBlocks, count: 1, flags: 8}, 0, false},
		{header{typ: frameBlocks, slot: 1, count: 1}, BlockSize, false},
	} {
		in := new(stream).frame(c.h, make([]byte, c.n)).frame(last, nil).Bytes()
		target := serveChannels(t, endOfControl(), [2][]byte{in, new(stream).frame(last, nil).Bytes()})
		if target.started != c.good {
			t.Errorf("%+v with %d bytes: started is %v", c.h, c.n, target.started)
		}
	}
}

// packedFrame is a PACKED frame of n pages that all begin with fill.
func packedFrame(t testing.TB, c Compression, n int, fill byte) (header, []byte) {
	p, err := newPacker(c)
	if err != nil {
		t.Fatal(err)
	}
	data := []uint64{1<<n - 1}
	packed, err := p.pack(bytes.Repeat([]byte{fill}, n*mempage.Size), data)
	if err != nil || packed == nil {
		t.Fatalf("%d bytes of packed pages, %v", len(packed), err)
	}
	meta := pagesPayload(n, 0, 0)
	copy(meta, pagesPayload(n, data[0], 0)[:8])
	return header{typ: framePacked, flags: p.codec, count: uint32(n)}, append(meta, packed...)
}

func endOfControl() []byte {
	return new(stream).state("state").frame(header{typ: frameCommit}, nil).Bytes()
}

func goodChannels(t testing.TB) [2][]byte {
	h, zstd := packedFrame(t, CompressZstd, 5, 'z')
	one := new(stream).frame(header{typ: framePages, count: 3}, pagesPayload(3, 0b101, 0b010)).frame(h, zstd).frame(round(0, flagLast), nil)
	h, packed := packedFrame(t, CompressLZ4, 2, 'l')
	h.slot, h.first = 1, 64
	two := new(stream).frame(h, packed).frame(round(0, flagLast), nil)
	return [2][]byte{one.Bytes(), two.Bytes()}
}

func TestDestinationTakesGoodChannels(t *testing.T) {
	target := serveChannels(t, endOfControl(), goodChannels(t))
	if !target.started {
		t.Fatal("the guest was not started")
	}
	if a, b := target.mem[0][4*mempage.Size], target.mem[1][65*mempage.Size]; a != 'z' || b != 'l' {
		t.Errorf("packed pages begin with %q and %q", a, b)
	}
}

// A data channel that is cut anywhere ends the migration, and nothing runs.
func TestDestinationRunsNothingOfACutChannel(t *testing.T) {
	good := goodChannels(t)
	for which := range good {
		for n := 0; n < len(good[which]); n += 1 + n/16 {
			cut := good
			cut[which] = cut[which][:n]
			if serveChannels(t, endOfControl(), cut).started {
				t.Fatalf("a guest runs after %d of %d bytes of channel %d", n, len(good[which]), which+1)
			}
		}
	}
}

// FuzzDataChannel feeds a destination what a hostile source may send by a data
// channel, while the other ends as it should.
func FuzzDataChannel(f *testing.F) {
	good := goodChannels(f)
	f.Add(good[0])
	f.Add(good[1])
	f.Add(new(stream).frame(header{typ: frameBlocks, first: 3, count: 1}, make([]byte, 512)).frame(round(0, flagLast), nil).Bytes())
	f.Add(new(stream).frame(header{typ: frameBlocks, first: 1, count: 2, flags: flagZero}, nil).frame(round(1<<32, flagDurable), nil).Bytes())
	f.Add(new(stream).frame(round(0, 0), nil).frame(round(1, flagLast), nil).Bytes())
	f.Fuzz(func(t *testing.T, in []byte) {
		serveChannels(t, endOfControl(), [2][]byte{in, new(stream).frame(round(0, flagLast), nil).Bytes()})
	})
}

// FuzzUnpack feeds the decompressors: what comes out has the length that was
// announced, or is an error, and no more than that is allocated for it.
func FuzzUnpack(f *testing.F) {
	for _, c := range []Compression{CompressZstd, CompressLZ4} {
		h, b := packedFrame(f, c, 3, 'x')
		f.Add(h.flags, b[16:], uint16(3))
		f.Add(h.flags, b[16:], uint16(2))
	}
	f.Fuzz(func(t *testing.T, codec uint8, packed []byte, pages uint16) {
		n := (int(pages)%maxSpan + 1) * mempage.Size
		var u unpacker
		defer u.close()
		out, err := u.unpack(codec, packed, n)
		if err == nil && len(out) != n || cap(u.plain) > maxPlain {
			t.Errorf("%d bytes of %d, room for %d", len(out), n, cap(u.plain))
		}
	})
}

// Spans of every kind of content are the same after packing and unpacking.
func TestPackAndUnpack(t *testing.T) {
	for _, c := range []Compression{CompressZstd, CompressLZ4} {
		p, err := newPacker(c)
		if err != nil {
			t.Fatal(err)
		}
		span := make([]byte, maxSpan*mempage.Size)
		for i := range span {
			span[i] = byte(i >> 5)
		}
		all := make([]uint64, packSpan/64)
		for i := range all {
			all[i] = 0xf0f0f0f0f0f0f0f0 | uint64(i)
		}
		for _, data := range [][]uint64{{1}, {3}, {1 << 63}, all} {
			var want []byte
			forRuns(data, func(start, end int) { want = append(want, span[start*mempage.Size:end*mempage.Size]...) })
			packed, err := p.pack(span, data)
			if err != nil || packed == nil {
				t.Fatalf("%s: %d bytes became %d, %v", c, len(want), len(packed), err)
			}
			var u unpacker
			got, err := u.unpack(p.codec, packed, len(want))
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %d bytes are not the same afterwards (%v)", c, len(want), err)
			}
			u.close()
		}
		noise := make([]byte, 64*mempage.Size)
		state := uint64(1)
		for i := range noise {
			state ^= state << 13
			state ^= state >> 7
			state ^= state << 17
			noise[i] = byte(state)
		}
		if packed, err := p.pack(noise, []uint64{^uint64(0)}); packed != nil || err != nil {
			t.Errorf("%s: noise became %d bytes, %v", c, len(packed), err)
		}
	}
}

// LeastAllocs is how often f allocates: the least of some measurements, since what
// other goroutines allocate counts too.
func LeastAllocs(f func()) float64 {
	n := testing.AllocsPerRun(20, f)
	for range 9 {
		n = min(n, testing.AllocsPerRun(20, f))
	}
	return n
}

// Neither side allocates for a span.
func TestSpansAllocateNothing(t *testing.T) {
	src := &heapTarget{t: t, mem: [2][]byte{bytes.Repeat([]byte{5}, 70*mempage.Size), make([]byte, 66*mempage.Size)}}
	for _, c := range []Compression{CompressNone, CompressLZ4} {
		l := &link{data: []*lane{newLane(1, newConn(byteConn{bytes.NewReader(nil)}))}}
		log := &toySource{heapTarget: *src}
		tr, err := newTracker(src.Slots(), log, 18)
		if err != nil {
			t.Fatal(err)
		}
		s, err := newSender(src, tr, l, &meter{}, Options{Compression: c}.withDefaults())
		if err != nil {
			t.Fatal(err)
		}
		w := s.workers[0]
		for i := range w.picked {
			w.picked[i] = ^uint64(0)
		}
		w.picked[1] = 0x3f
		if n := LeastAllocs(func() {
			if _, err := w.sendSpan(context.Background(), 0, 0, 70); err != nil {
				t.Fatal(err)
			}
		}); n > 0 {
			t.Errorf("%s: %v allocations for a span", c, n)
		}
	}
	for _, c := range []Compression{CompressNone, CompressLZ4, CompressZstd} {
		h, payload := header{typ: framePages, count: 3}, pagesPayload(3, 7, 0)
		if c != CompressNone {
			h, payload = packedFrame(t, c, 3, 'x')
		}
		h.length = uint32(len(payload))
		s := newSession(context.Background(), sessionID{1}, newConn(byteConn{bytes.NewReader(nil)}), 1, 0)
		s.features = knownFeatures
		s.slots = src.Slots()
		in := &inlet{session: s}
		reader := bytes.NewReader(payload)
		in.conn = newConn(byteConn{reader})
		if n := LeastAllocs(func() {
			_, _ = reader.Seek(0, io.SeekStart)
			if err := in.apply(src, h); err != nil {
				t.Fatal(err)
			}
		}); n > 0 {
			t.Errorf("%s: %v allocations for a frame at the destination", c, n)
		}
	}
}
