package snapshot

import (
	"context"
	"runtime"

	"github.com/govmm/govmm/mempage"
	"github.com/klauspost/compress/zstd"
)

// readMemory reads all of the guest's memory into ram, which reads as zero, on several
// threads, and checks it.
func (s *Snapshot) readMemory(ctx context.Context, ram []byte) error {
	if uint64(len(ram)) != s.Manifest.Memory.Bytes {
		return damaged("memory of %d bytes, expected %d", len(ram), s.Manifest.Memory.Bytes)
	}
	read := s.readPlain
	if s.packed() {
		read = s.readPacked
	}
	sum, _, err := read(ctx, ram)
	if err == nil {
		err = s.compareSum(sum)
	}
	return err
}

// readers is how many threads read: more than processors, since they wait for the disk.
func readers() int { return min(2*runtime.GOMAXPROCS(0), 16) }

// readPlain reads memory where it lies.
func (s *Snapshot) readPlain(ctx context.Context, ram []byte) (sum string, pages uint64, err error) {
	return inUnits(uint64(len(ram)), readers(), &s.read, func(start, end int64) (unitSum, error) {
		h := newSummer()
		err := eachChunk(int(s.memory.Fd()), start, end, func(from, to int64) error {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			b := ram[from:to]
			return mempage.Guard(func() error {
				if _, err := s.memory.ReadAt(b, from); err != nil {
					return damaged("read memory: %w", err)
				}
				h.add(b, uint64(from)>>mempage.Shift)
				return nil
			})
		})
		return h.end(), err
	})
}

// readPacked reads packed memory; ram nil: it is only looked at.
func (s *Snapshot) readPacked(ctx context.Context, ram []byte) (sum string, pages uint64, err error) {
	return inUnits(s.Manifest.Memory.Bytes, runtime.GOMAXPROCS(0), &s.read, func(start, end int64) (unitSum, error) {
		dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(2*packChunk),
			zstd.WithDecoderMaxWindow(2*packChunk), zstd.WithDecodeAllCapLimit(true))
		if err != nil {
			return unitSum{}, err
		}
		defer dec.Close()
		h, frame, plain := newSummer(), make([]byte, maxFrame), make([]byte, 0, chunkMap+packChunk)
		var scratch []byte
		if ram == nil {
			scratch = make([]byte, packChunk)
		}
		for at := start; at < end; at += packChunk {
			if err := context.Cause(ctx); err != nil {
				return unitSum{}, err
			}
			n := at / packChunk
			from, to := int64(0), s.ends[n]
			if n > 0 {
				from = s.ends[n-1]
			}
			if from == to {
				continue
			}
			limit := min(at+packChunk, end)
			var chunk []byte
			if ram == nil {
				chunk = scratch[:limit-at]
				clear(chunk)
			} else {
				chunk = ram[at:limit]
			}
			if _, err := s.memory.ReadAt(frame[:to-from], from); err != nil {
				return unitSum{}, damaged("read memory: %w", err)
			}
			out, err := dec.DecodeAll(frame[:to-from], plain[:0])
			if err != nil {
				return unitSum{}, damaged("memory: %w", err)
			}
			err = mempage.Guard(func() error {
				if err := unpackInto(chunk, out); err != nil {
					return damaged("memory: %w", err)
				}
				h.add(chunk, uint64(at)>>mempage.Shift)
				return nil
			})
			if err != nil {
				return unitSum{}, err
			}
		}
		return h.end(), nil
	})
}
