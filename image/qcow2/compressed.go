package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/govmm/govmm/image/qcow2/inflate"
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
	stored  []byte
	in      bytes.Reader
	deflate inflate.Decoder
	zstd    *zstd.Decoder // nil: not needed so far
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
	var err error
	if f.zstd {
		err = d.fromZstd(p)
	} else {
		err = d.deflate.Fill(p, d.stored)
	}
	if err != nil {
		return fmt.Errorf("%w: the compressed cluster at offset %d of the file, %d bytes: %w", ErrDamaged, e.host, e.stored, err)
	}
	return nil
}

// fromZstd fills p from what is stored. What follows the frame in its last sector is not
// looked at.
func (d *decompressor) fromZstd(p []byte) error {
	d.in.Reset(d.stored)
	in := struct{ io.Reader }{&d.in} // no more than a reader: the decoder would take a buffer for frames only
	var err error
	if d.zstd == nil {
		d.zstd, err = zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(1<<(maxClusterBits+2)))
	} else {
		err = d.zstd.Reset(in)
	}
	if err == nil {
		_, err = io.ReadFull(d.zstd, p)
	}
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
