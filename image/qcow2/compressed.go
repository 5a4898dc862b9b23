package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// inflatedBytes is how many bytes of clusters that were decompressed for a smaller read
// are kept.
const inflatedBytes = 4 << 20

// inflater decompresses clusters.
type inflater struct {
	zstd    bool
	cluster int64
	pool    sync.Pool // of *decompressor

	keptMu sync.Mutex // guards kept
	kept   map[int64][]byte
}

// decompressor is what one goroutine decompresses with.
type decompressor struct {
	stored []byte
	in     bytes.Reader
	flate  io.ReadCloser // nil, or a flate.Resetter
	zstd   *zstd.Decoder
}

func (f *inflater) init(h *Header) {
	f.zstd, f.cluster, f.kept = h.Compression == "zstd", h.ClusterSize(), map[int64][]byte{}
}

// readCompressed fills p from a compressed cluster.
func (im *Image) readCompressed(p []byte, e extent) error {
	f := &im.inflate
	if e.within == 0 && int64(len(p)) == f.cluster {
		return im.decompress(p, e)
	}
	f.keptMu.Lock()
	b := f.kept[e.host]
	f.keptMu.Unlock()
	if b == nil {
		b = make([]byte, f.cluster)
		if err := im.decompress(b, e); err != nil {
			return err
		}
		f.keptMu.Lock()
		if int64(len(f.kept)) >= inflatedBytes/f.cluster {
			for old := range f.kept { // any
				delete(f.kept, old)
				break
			}
		}
		f.kept[e.host] = b
		f.keptMu.Unlock()
	}
	copy(p, b[e.within:])
	return nil
}

// decompress fills a cluster.
func (im *Image) decompress(p []byte, e extent) error {
	f := &im.inflate
	d, _ := f.pool.Get().(*decompressor)
	if d == nil {
		d = new(decompressor)
	}
	defer f.pool.Put(d)
	if int64(cap(d.stored)) < e.stored {
		d.stored = make([]byte, e.stored)
	}
	d.stored = d.stored[:e.stored]
	if err := readFull(im.tables.r, d.stored, e.host); err != nil {
		return err
	}
	d.in.Reset(d.stored)
	r, err := d.reader(f.zstd)
	if err == nil {
		_, err = io.ReadFull(r, p)
	}
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("%w: the compressed cluster at offset %d of the file, %d bytes: %w", ErrDamaged, e.host, e.stored, err)
	}
	return nil
}

// reader returns the decompressed bytes of d.in. What follows the compressed data in its
// last sector is not looked at.
func (d *decompressor) reader(isZstd bool) (io.Reader, error) {
	if isZstd {
		in := struct{ io.Reader }{&d.in} // no more than a reader: the decoder would take a buffer for frames only
		if d.zstd != nil {
			return d.zstd, d.zstd.Reset(in)
		}
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(1<<(maxClusterBits+2)))
		d.zstd = z
		return z, err
	}
	if d.flate != nil {
		return d.flate, d.flate.(flate.Resetter).Reset(&d.in, nil)
	}
	d.flate = flate.NewReader(&d.in)
	return d.flate, nil
}
