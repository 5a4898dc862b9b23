package blk

import (
	"errors"
	"fmt"
	"math/bits"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// blockLog records which blocks of a disk change while it is copied to another host. It
// lies above the image, so that every way to change a block passes it.
type blockLog struct {
	shift uint
	words []atomic.Uint64 // a bit for each block
}

// changed is called when a request has changed [off, off+n) of the image, or may have,
// and before the guest can learn that it is done. It takes less than a request by far.
func (d *Device) changed(off, n int64) {
	d.flushes.changed.Add(1)
	log := d.blockLog.Load()
	if log == nil || n <= 0 {
		return
	}
	for b, last := uint64(off)>>log.shift, uint64(off+n-1)>>log.shift; b <= last; b++ {
		if bit := uint64(1) << (b % 64); log.words[b/64].Load()&bit == 0 {
			log.words[b/64].Or(bit)
		}
	}
}

// StartBlockLog implements [migrate.Disk].
func (d *Device) StartBlockLog(block uint64) error {
	if block < SectorSize || block&(block-1) != 0 {
		return fmt.Errorf("disk %s: record blocks of %d bytes: must be a power of two, at least %d", d.config.Path, block, SectorSize)
	}
	d.blockLog.Store(&blockLog{shift: uint(bits.TrailingZeros64(block)), words: make([]atomic.Uint64, (d.Size()-1)/block/64+1)})
	return nil
}

// StopBlockLog implements [migrate.Disk].
func (d *Device) StopBlockLog() { d.blockLog.Store(nil) }

// FetchBlocks implements [migrate.Disk].
func (d *Device) FetchBlocks(each func(w int, word uint64)) {
	log := d.blockLog.Load()
	if log == nil {
		return
	}
	for w := range log.words {
		if log.words[w].Load() != 0 {
			each(w, log.words[w].Swap(0))
		}
	}
}

// ReadBlocks implements [migrate.Disk].
func (d *Device) ReadBlocks(p []byte, off uint64) error {
	if err := d.image.read([][]byte{p}, int64(off), new(scratch)); err != nil {
		return fmt.Errorf("disk %s: read %d bytes at %d: %w", d.config.Path, len(p), off, err)
	}
	return nil
}

// NextData implements [migrate.Disk].
func (d *Device) NextData(off uint64) (start, end uint64, err error) {
	size := d.Size()
	seek := func(from uint64, whence int) (uint64, error) {
		n, err := unix.Seek(d.image.fd, int64(from), whence)
		return uint64(n), err
	}
	start, err = seek(off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // none behind it
		return size, size, nil
	case errors.Is(err, unix.EINVAL): // a block device
		return off, size, nil
	case err != nil:
		return 0, 0, fmt.Errorf("disk %s: find data at or after %d: %w", d.config.Path, off, err)
	}
	if end, err = seek(start, unix.SEEK_HOLE); err != nil {
		return 0, 0, fmt.Errorf("disk %s: find a hole after %d: %w", d.config.Path, start, err)
	}
	return min(start, size), min(max(end, start), size), nil
}
