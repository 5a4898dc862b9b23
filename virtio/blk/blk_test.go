package blk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
)

func eachLayout(t *testing.T, f func(t *testing.T, features uint64)) {
	for name, features := range layouts {
		t.Run(name, func(t *testing.T) { f(t, features) })
	}
}

func content(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestRequests(t *testing.T) {
	eachLayout(t, func(t *testing.T, features uint64) {
		path := newImage(t, 1<<20)
		d := open(t, Config{Path: path, ID: "serial-1"})
		r := newRig(t, d, features)
		disk := content(t, path)

		before := r.mem.Snapshot()
		status, n := r.do(typeIn, 3, 4096, true)
		want(t, "read", status, statusOK)
		if n != 4097 {
			t.Fatalf("read: length %d", n)
		}
		if !bytes.Equal(r.data(4096), disk[3*512:3*512+4096]) {
			t.Fatal("read: other bytes than the file's")
		}
		if lost := r.unmarked(before); len(lost) > 0 {
			t.Fatalf("written and not marked: %#x", lost)
		}

		copy(r.data(1024), bytes.Repeat([]byte("govmm!!!"), 128))
		status, n = r.do(typeOut, 2046, 1024, false)
		want(t, "write", status, statusOK)
		if n != 1 {
			t.Fatalf("write: length %d", n)
		}
		copy(disk[2046*512:], r.data(1024))
		status, _ = r.do(typeFlush, 0, 0, false)
		want(t, "flush", status, statusOK)
		if !bytes.Equal(content(t, path), disk) {
			t.Fatal("write: the file has other bytes")
		}

		status, n = r.do(typeGetID, 0, 20, true)
		want(t, "get id", status, statusOK)
		if got := string(r.data(20)); got != "serial-1"+string(make([]byte, 12)) || n != 21 {
			t.Fatalf("get id: %q, length %d", got, n)
		}
		status, _ = r.do(99, 0, 0, false)
		want(t, "unknown request", status, statusUnsupported)

		status, n = r.do(typeIn, 0, 0, true)
		want(t, "read of nothing", status, statusOK)
		if n != 1 {
			t.Fatalf("read of nothing: length %d", n)
		}
		if s := d.Stats(); s.Reads != 2 || s.Writes != 1 || s.WrittenBytes != 1024 || s.Flushes != 1 || s.Errors != 0 {
			t.Fatalf("counters %+v", s)
		}
	})
}

// What lies outside of the disk, or is no number of sectors, is an error and
// changes nothing, however the numbers wrap.
func TestBounds(t *testing.T) {
	path := newImage(t, 64<<10) // 128 sectors
	disk := content(t, path)
	r := newRig(t, open(t, Config{Path: path}), layouts["split"])
	for _, c := range []struct {
		sector uint64
		n      int
	}{{128, 512}, {127, 1024}, {129, 0}, {1 << 55, 512}, {1<<64 - 1, 512}, {1<<64 - 1, 1024}, {1<<55 - 1, 1024}, {0, 511}, {0, 1}, {0, 128<<10 + 512}} {
		for _, in := range []bool{true, false} {
			kind := uint32(typeOut)
			if in {
				kind = typeIn
			}
			if status, _ := r.do(kind, c.sector, c.n, in); status != statusIOErr {
				t.Errorf("type %d, sector %#x, %d bytes: status %d", kind, c.sector, c.n, status)
			}
		}
	}
	if status, _ := r.do(typeIn, 128, 0, true); status != statusOK {
		t.Errorf("nothing at the end: status %d", status)
	}
	if !bytes.Equal(content(t, path), disk) {
		t.Error("the file has changed")
	}
}

func (r *rig) putRange(i int, sector uint64, sectors, flags uint32) {
	b := r.data(4096)[i*rangeSize:]
	binary.LittleEndian.PutUint64(b, sector)
	binary.LittleEndian.PutUint32(b[8:], sectors)
	binary.LittleEndian.PutUint32(b[12:], flags)
}

func TestDiscardAndZeroes(t *testing.T) {
	for _, direct := range []bool{false, true} {
		path := newImage(t, 1<<20)
		disk := content(t, path)
		r := newRig(t, open(t, Config{Path: path, Direct: direct}), layouts["split"])
		zero := func(sector, n uint64) { clear(disk[sector*512 : (sector+n)*512]) }

		r.putRange(0, 1, 3, 0)
		status, _ := r.do(typeWriteZeroes, 0, rangeSize, false)
		want(t, "write zeroes", status, statusOK)
		zero(1, 3)
		r.putRange(0, 101, 77, flagUnmap)
		status, _ = r.do(typeWriteZeroes, 0, rangeSize, false)
		want(t, "write zeroes, unmap", status, statusOK)
		zero(101, 77)
		r.putRange(0, 512, 256, 0)
		r.putRange(1, 1024, 8, 0)
		status, _ = r.do(typeDiscard, 0, 2*rangeSize, false)
		want(t, "discard", status, statusOK)
		zero(512, 256) // as the file systems that tests run on do it
		zero(1024, 8)
		if !bytes.Equal(content(t, path), disk) {
			t.Fatal("the file has other bytes")
		}

		for _, c := range []struct {
			what    string
			kind    uint32
			sector  uint64
			sectors uint32
			flags   uint32
			n       int
			status  byte
		}{
			{"discard with unmap", typeDiscard, 0, 1, flagUnmap, rangeSize, statusUnsupported},
			{"reserved flag", typeWriteZeroes, 0, 1, 2, rangeSize, statusUnsupported},
			{"beyond the end", typeDiscard, 2047, 2, 0, rangeSize, statusIOErr},
			{"far beyond", typeWriteZeroes, 1<<64 - 1, 2, 0, rangeSize, statusIOErr},
			{"too much", typeWriteZeroes, 0, maxZeroSectors + 1, 0, rangeSize, statusIOErr},
			{"half a range", typeDiscard, 0, 1, 0, rangeSize - 1, statusIOErr},
			{"no range", typeDiscard, 0, 1, 0, 0, statusIOErr},
			{"too many ranges", typeDiscard, 0, 1, 0, (maxDiscardRanges + 1) * rangeSize, statusIOErr},
			{"two ranges", typeWriteZeroes, 0, 1, 0, 2 * rangeSize, statusIOErr},
			{"nothing", typeDiscard, 2048, 0, 0, rangeSize, statusOK},
		} {
			for i := range maxDiscardRanges + 1 {
				r.putRange(i, c.sector, c.sectors, c.flags)
			}
			status, _ := r.do(c.kind, 0, c.n, false)
			want(t, c.what, status, c.status)
		}
		if !bytes.Equal(content(t, path), disk) {
			t.Fatal("a request that failed changed the file")
		}
	}
}

func TestReadOnly(t *testing.T) {
	path := newImage(t, 64<<10)
	disk := content(t, path)
	d := open(t, Config{Path: path, ReadOnly: true})
	if d.Features()&FeatureReadOnly == 0 || d.Features()&(FeatureFlush|FeatureDiscard|FeatureWriteZeroes) != 0 {
		t.Fatalf("features %#x", d.Features())
	}
	r := newRig(t, d, layouts["split"])
	status, _ := r.do(typeOut, 0, 512, false)
	want(t, "write", status, statusIOErr)
	r.putRange(0, 0, 1, 0)
	status, _ = r.do(typeDiscard, 0, rangeSize, false)
	want(t, "discard", status, statusIOErr)
	status, _ = r.do(typeFlush, 0, 0, false)
	want(t, "flush", status, statusOK)
	status, _ = r.do(typeIn, 0, 512, true)
	want(t, "read", status, statusOK)
	if !bytes.Equal(content(t, path), disk) {
		t.Fatal("the file has changed")
	}
	if d.Stats().Errors != 0 {
		t.Fatal("the host was asked to write")
	}
}

// A file that becomes shorter is an error of the host: the driver gets IOERR,
// and what a read changed in memory before is marked.
func TestHostError(t *testing.T) {
	path := newImage(t, 64<<10)
	d := open(t, Config{Path: path})
	r := newRig(t, d, layouts["split"])
	if err := os.Truncate(path, 6<<10); err != nil {
		t.Fatal(err)
	}
	copy(r.data(8192), bytes.Repeat([]byte{0xaa}, 8192))
	before := r.mem.Snapshot()
	status, n := r.do(typeIn, 0, 8192, true)
	want(t, "read", status, statusIOErr)
	if lost := r.unmarked(before); len(lost) > 0 || n != 8193 {
		t.Fatalf("length %d, written and not marked: %#x", n, lost)
	}
	if !bytes.Equal(r.data(8192), make([]byte, 8192)) {
		t.Error("a part of a read that failed is in memory")
	}
	if d.Stats().Errors != 1 {
		t.Errorf("counters %+v", d.Stats())
	}
	status, _ = r.do(typeIn, 0, 512, true)
	want(t, "read after it", status, statusOK)
}

// A request that has no header or no place for a status makes the device need a
// reset, after which it works.
func TestMalformed(t *testing.T) {
	for name, bufs := range map[string]struct{ readable, writable []virtiotest.Buffer }{
		"short header": {[]virtiotest.Buffer{{GPA: base + 16<<20, Len: 15}}, []virtiotest.Buffer{{GPA: base + 17<<20, Len: 1}}},
		"no header":    {nil, []virtiotest.Buffer{{GPA: base + 16<<20, Len: 513}}},
		"no status":    {[]virtiotest.Buffer{{GPA: base + 16<<20, Len: 16}}, nil},
		"not RAM":      {[]virtiotest.Buffer{{GPA: 0, Len: 16}}, []virtiotest.Buffer{{GPA: base, Len: 1}}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, open(t, Config{Path: newImage(t, 64<<10)}), layouts["split"])
			if _, ok := r.drivers[0].Add(bufs.readable, bufs.writable); !ok {
				t.Fatal("the ring is full")
			}
			r.queues[0].Signal()
			err := <-r.reset
			if !errors.Is(err, errRequest) && !errors.Is(err, virtio.ErrRing) {
				t.Fatalf("needs a reset: %v", err)
			}
			r.d.Reset()
			r.queues[0].Stop()
			r.drivers[0] = virtiotest.NewDriver(t, r.mem, base, queueSize, r.features)
			r.attach(r.d, nil)
			status, _ := r.do(typeIn, 0, 512, true)
			want(t, "read", status, statusOK)
		})
	}
}

// Requests may be cut into descriptors in any way (2.7.4).
func TestFraming(t *testing.T) {
	path := newImage(t, 64<<10)
	disk := content(t, path)
	r := newRig(t, open(t, Config{Path: path}), layouts["split"])
	header := r.drivers[0].Bytes(r.free, 16)
	clear(header)
	header[8] = 5
	gpa := r.free + 4096
	_, ok := r.drivers[0].Add(
		[]virtiotest.Buffer{{GPA: r.free, Len: 3}, {GPA: r.free + 3, Len: 13}},
		[]virtiotest.Buffer{{GPA: gpa + 1, Len: 700}, {GPA: gpa + 9000, Len: 325}}) // 1024 of data, 1 of status
	if !ok {
		t.Fatal("the ring is full")
	}
	r.queues[0].Signal()
	if u := r.wait(0); u.Len != 1025 {
		t.Fatalf("length %d", u.Len)
	}
	got := append(append([]byte(nil), r.drivers[0].Bytes(gpa+1, 700)...), r.drivers[0].Bytes(gpa+9000, 325)...)
	if !bytes.Equal(got, append(append([]byte(nil), disk[5*512:7*512]...), statusOK)) {
		t.Fatal("other bytes")
	}
}

// A model of the disk against random requests, many in flight on two queues,
// while the device pauses and moves to another one.
func TestModel(t *testing.T) {
	eachLayout(t, func(t *testing.T, features uint64) {
		const areas, areaSectors = 24, 64 // one request at a time in each
		path := newImage(t, areas*areaSectors*512)
		disk := content(t, path)
		config := Config{Path: path, Queues: 2}
		d := open(t, config)
		if err := d.Lock(); err != nil {
			t.Fatal(err)
		}
		r := newRig(t, d, features)
		rng := rand.New(rand.NewPCG(1, features))
		type pending struct {
			request
			area   int
			read   bool
			wanted []byte
		}
		inFlight := [2]map[uint16]pending{{}, {}}
		free := rng.Perm(areas)
		collect := func(q int) {
			u := r.wait(q)
			p := inFlight[q][u.Token]
			delete(inFlight[q], u.Token)
			free = append(free, p.area)
			want(t, "request", r.drivers[q].Bytes(p.status, 1)[0], statusOK)
			if p.read && !bytes.Equal(r.drivers[q].Bytes(p.data.GPA, uint64(p.data.Len)), p.wanted) {
				t.Fatalf("area %d reads other bytes", p.area)
			}
		}
		for range 1500 {
			switch q := rng.IntN(2); rng.IntN(5) {
			case 0, 1, 2:
				if len(free) == 0 {
					break
				}
				area := free[0]
				free = free[1:]
				first := rng.IntN(areaSectors)
				n := (1 + rng.IntN(areaSectors-first)) * 512
				sector := uint64(area*areaSectors + first)
				gpa := r.free + uint64(area)*(areaSectors*512+4096)
				data := virtiotest.Buffer{GPA: gpa + 4096, Len: uint32(n)}
				p := pending{area: area, read: rng.IntN(2) == 0}
				kind := uint32(typeOut)
				part := disk[sector*512 : sector*512+uint64(n)]
				if p.read {
					kind = typeIn
					p.wanted = bytes.Clone(part)
				} else {
					b := r.drivers[q].Bytes(data.GPA, uint64(n))
					for i := range b {
						b[i] = byte(rng.Uint32())
					}
					copy(part, b)
				}
				r.drivers[q].Indirect = rng.IntN(2) == 0
				p.request = r.send(q, gpa, kind, sector, data, p.read)
				inFlight[q][p.token] = p
			case 3:
				if len(inFlight[q]) > 0 {
					collect(q)
				}
			case 4:
				if rng.IntN(4) > 0 {
					break
				}
				if err := r.d.Pause(context.Background()); err != nil {
					t.Fatal(err)
				}
				var saved []virtio.QueueState
				for _, q := range r.queues {
					s, err := q.SaveState()
					if err != nil {
						t.Fatal(err)
					}
					saved = append(saved, s)
				}
				state, err := r.d.SaveState()
				if err != nil {
					t.Fatal(err)
				}
				dst := open(t, config)
				if err := dst.LoadState(state); err != nil {
					t.Fatal(err)
				}
				if err := dst.Lock(); !errors.Is(err, ErrInUse) {
					t.Fatalf("lock while the source has it: %v", err)
				}
				if err := r.d.Unlock(); err != nil {
					t.Fatal(err)
				}
				if err := dst.Lock(); err != nil {
					t.Fatal(err)
				}
				again, err := dst.SaveState()
				if err != nil || !bytes.Equal(again, state) {
					t.Fatalf("saved again: %v", err)
				}
				r.d.Reset()
				r.attach(dst, saved)
				for _, q := range r.queues {
					q.Signal()
				}
			}
		}
		for q := range inFlight {
			for len(inFlight[q]) > 0 {
				collect(q)
			}
		}
		status, _ := r.do(typeFlush, 0, 0, false)
		want(t, "flush", status, statusOK)
		if !bytes.Equal(content(t, path), disk) {
			t.Fatal("the file has other bytes")
		}
	})
}

func TestPause(t *testing.T) {
	d := open(t, Config{Path: newImage(t, 64<<10)})
	r := newRig(t, d, layouts["split"])
	if err := d.Pause(context.Background()); err != nil {
		t.Fatal(err)
	}
	req := r.send(0, r.free, typeIn, 0, virtiotest.Buffer{GPA: r.free + 4096, Len: 512}, true)
	if err := d.Pause(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, ok := r.drivers[0].Used(); ok || r.drivers[0].Bytes(req.status, 1)[0] != 0xff {
		t.Fatal("a request was served while the device was paused")
	}
	if err := d.Resume(); err != nil {
		t.Fatal(err)
	}
	r.queues[0].Signal()
	r.wait(0)
	// When a pause is given up because a request takes long, the disk goes on.
	d.image.blocks.Lock()
	r.send(0, r.free, typeOut, 0, virtiotest.Buffer{GPA: r.free + 4096, Len: 512}, false)
	for {
		if _, err := r.queues[0].SaveState(); errors.Is(err, virtio.ErrInFlight) {
			break
		}
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("given up")
	cancel(why)
	if err := d.Pause(ctx); !errors.Is(err, why) {
		t.Fatalf("pause: %v", err)
	}
	d.image.blocks.Unlock()
	r.wait(0)
	status, _ := r.do(typeIn, 0, 512, true)
	want(t, "read", status, statusOK)
}
