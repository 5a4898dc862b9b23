package blk

import (
	"bytes"
	"encoding/binary"
	"os"
	"testing"

	"github.com/govmm/govmm/virtio/virtiotest"
)

// FuzzRequests gives a disk requests made of anything, in descriptors of any
// shape: every one is answered or makes the device need a reset, the file keeps
// its size, and a read-only disk its content.
func FuzzRequests(f *testing.F) {
	header := func(kind uint32, sector uint64) []byte {
		b := make([]byte, headerSize)
		binary.LittleEndian.PutUint32(b, kind)
		binary.LittleEndian.PutUint64(b[8:], sector)
		return b
	}
	shape := []byte{16, 0, 0, 2, 1, 0} // readable and writable lengths, 3 of each
	for _, kind := range []uint32{typeIn, typeOut, typeFlush, typeGetID, typeDiscard, typeWriteZeroes, 77} {
		f.Add(append(bytes.Clone(shape), header(kind, 1)...), byte(kind))
		f.Add(append([]byte{16, 2, 0, 1, 0, 0}, append(header(kind, 1<<63), make([]byte, 512)...)...), byte(1))
	}
	f.Fuzz(func(t *testing.T, input []byte, mode byte) {
		const size = 64 << 10
		path := newImage(t, size)
		readOnly := mode&1 != 0
		d := open(t, Config{Path: path, ReadOnly: readOnly, Direct: mode&2 != 0})
		names := []string{"split", "split event_idx", "packed event_idx"}
		r := newRig(t, d, layouts[names[int(mode>>2)%len(names)]])
		before := content(t, path)
		for len(input) > 6 {
			var readable, writable []virtiotest.Buffer
			gpa, n := r.free, 0
			for i, b := range input[:6] {
				// Small lengths as they are, and sectors of data.
				length := uint32(b)
				if b >= 128 {
					length = uint32(b-127) * 512
				}
				buf := virtiotest.Buffer{GPA: gpa, Len: length}
				if i < 3 {
					readable = append(readable, buf)
					n += int(length)
				} else {
					writable = append(writable, buf)
				}
				gpa += uint64(length)
			}
			input = input[6:]
			n = copy(r.drivers[0].Bytes(r.free, uint64(n)), input)
			input = input[n:]
			if _, ok := r.drivers[0].Add(readable, writable); !ok {
				t.Fatal("the ring is full")
			}
			r.queues[0].Signal()
			broken := false
			for answered := false; !answered && !broken; {
				if _, answered = r.drivers[0].Used(); answered {
					break
				}
				select {
				case <-r.interrupts[0]:
				case <-r.reset:
					broken = true
				}
			}
			if broken {
				break
			}
		}
		d.Reset()
		info, err := os.Stat(path)
		if err != nil || info.Size() != size {
			t.Fatalf("the file: %v, %v", info, err)
		}
		if readOnly && !bytes.Equal(content(t, path), before) {
			t.Fatal("a read-only disk was written")
		}
	})
}

// FuzzState loads anything: it is refused, or it is what is saved again.
func FuzzState(f *testing.F) {
	d := open(f, Config{Path: newImage(f, 64<<10)})
	good, err := d.SaveState()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		if d.LoadState(b) != nil {
			return
		}
		once, err := d.SaveState()
		if err != nil {
			t.Fatal(err)
		}
		if err := d.LoadState(once); err != nil {
			t.Fatal(err)
		}
		if twice, err := d.SaveState(); err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%x, then %x, %v", once, twice, err)
		}
	})
}
