package snapshot

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/govmm/govmm/mempage"
	"github.com/klauspost/compress/zstd"
)

// Packed memory is a file of frames of zstd, one for each chunk of memory that has data,
// and an index: where each frame ends, 8 bytes little-endian for each chunk. A frame is a
// bitmap of the chunk's pages, and those whose bit is set.

const (
	packChunk = 1 << 20 // bytes of memory in a frame
	chunkMap  = packChunk / mempage.Size / 8
	// maxFrame is the most that zstd makes of a chunk.
	maxFrame = chunkMap + packChunk + packChunk/128 + 1024
)

func chunks(size uint64) int64 { return int64((size + packChunk - 1) / packChunk) }

// indexSize is the size of the index of so much memory.
func indexSize(size uint64) int64 { return 8 * chunks(size) }

// pack packs the file of memory, and makes its sum.
func (d *draft) pack(ctx context.Context, done *atomic.Uint64) error {
	m := &d.manifest
	out, err := d.create(packedFile)
	if err != nil {
		return err
	}
	frames := &frames{out: out, ends: make([]int64, chunks(m.Memory.Bytes)), waiting: map[int64][]byte{}}
	sum, pages, err := inUnits(m.Memory.Bytes, runtime.GOMAXPROCS(0), done, func(start, end int64) (unitSum, error) {
		return d.packUnit(ctx, frames, start, end)
	})
	if err == nil {
		err = out.Sync()
	}
	if err = errors.Join(err, out.Close()); err != nil {
		return d.failed("pack", err)
	}
	index := make([]byte, 0, len(frames.ends)*8)
	for _, at := range frames.ends {
		index = binary.LittleEndian.AppendUint64(index, uint64(at))
	}
	m.Memory.SHA256, m.Memory.DataBytes = sum, pages<<mempage.Shift
	m.Features = append(m.Features, featurePacked)
	return d.write(indexFile, index)
}

// packUnit packs the chunks of a unit.
func (d *draft) packUnit(ctx context.Context, out *frames, start, end int64) (unitSum, error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
		zstd.WithWindowSize(packChunk), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return unitSum{}, err
	}
	defer enc.Close()
	s, chunk, plain := newSummer(), make([]byte, packChunk), make([]byte, 0, chunkMap+packChunk)
	var list [][]byte
	for at := start; at < end; at += packChunk {
		if err := context.Cause(ctx); err != nil {
			return unitSum{}, err
		}
		limit := min(at+packChunk, end)
		plain = append(plain[:0], make([]byte, chunkMap)...)
		err := eachChunk(int(d.memory.Fd()), at, limit, func(from, to int64) error {
			b := chunk[:to-from]
			if _, err := d.memory.ReadAt(b, from); err != nil {
				return err
			}
			s.add(b, uint64(from)>>mempage.Shift)
			for i := int64(0); i < int64(len(b)); i += mempage.Size {
				if page := b[i : i+mempage.Size]; !allZero(page) {
					n := (from + i - at) >> mempage.Shift
					plain[n/8] |= 1 << (n % 8)
					plain = append(plain, page...)
				}
			}
			return nil
		})
		if err != nil {
			return unitSum{}, err
		}
		var frame []byte
		if len(plain) > chunkMap {
			frame = enc.EncodeAll(plain, nil)
		}
		list = append(list, frame)
	}
	return s.end(), out.add(start/packChunk, list)
}

// frames writes frames in the order of their chunks.
type frames struct {
	out *os.File

	frameMu sync.Mutex // guards all below; held while frames are written
	ends    []int64
	next    int64 // chunk to be written
	end     int64 // of the file
	waiting map[int64][]byte
}

// add writes the frames of consecutive chunks when those before have been written.
func (f *frames) add(first int64, list [][]byte) error {
	f.frameMu.Lock()
	defer f.frameMu.Unlock()
	for i, b := range list {
		f.waiting[first+int64(i)] = b
	}
	for {
		b, ok := f.waiting[f.next]
		if !ok {
			return nil
		}
		delete(f.waiting, f.next)
		if _, err := f.out.Write(b); err != nil {
			return err
		}
		f.end += int64(len(b))
		f.ends[f.next] = f.end
		f.next++
	}
}

// parseIndex reads where frames end, in a file of so many bytes.
func parseIndex(b []byte, size uint64, packed int64) (ends []int64, err error) {
	if int64(len(b)) != indexSize(size) {
		return nil, fmt.Errorf("%s: expected %d bytes, found %d", indexFile, indexSize(size), len(b))
	}
	ends = make([]int64, 0, len(b)/8)
	last := int64(0)
	for ; len(b) > 0; b = b[8:] {
		end := int64(binary.LittleEndian.Uint64(b))
		if end < last || end-last > maxFrame || end > packed {
			return nil, fmt.Errorf("%s: a frame from byte %d to %d: must have at most %d bytes, of %d", indexFile, last, end, maxFrame, packed)
		}
		ends, last = append(ends, end), end
	}
	if last != packed {
		return nil, fmt.Errorf("%s: frames of %d bytes: expected %d", indexFile, last, packed)
	}
	return ends, nil
}

// unpackInto puts the pages of a frame into the memory of its chunk, which reads as zero.
func unpackInto(chunk, plain []byte) error {
	if len(plain) < chunkMap {
		return fmt.Errorf("a frame of %d bytes: expected %d or more", len(plain), chunkMap)
	}
	have := plain[:chunkMap]
	plain = plain[chunkMap:]
	for n := range chunkMap * 8 {
		if have[n/8]>>(n%8)&1 == 0 {
			continue
		}
		if len(plain) < mempage.Size || (n+1)*mempage.Size > len(chunk) {
			return fmt.Errorf("page %d of a chunk of %d bytes, with %d bytes left", n, len(chunk), len(plain))
		}
		copy(chunk[n*mempage.Size:], plain[:mempage.Size])
		plain = plain[mempage.Size:]
	}
	if len(plain) > 0 {
		return fmt.Errorf("%d bytes behind the last page of a chunk", len(plain))
	}
	return nil
}
