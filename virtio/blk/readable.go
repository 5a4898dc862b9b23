package blk

import (
	"fmt"
	"io"

	"github.com/govmm/govmm/virtio"
)

var _ virtio.Readable = (*backend)(nil)

// ReadAt reads bytes of the disk for its host, as the guest would find them. It
// implements [virtio.Readable]; requests of the guest may be under way, but what they
// write meanwhile is read or not.
func (d *Device) ReadAt(p []byte, off int64) (n int, err error) {
	size := int64(d.Size())
	if off < 0 || off > size {
		return 0, fmt.Errorf("disk %s: read at %d: it has %d bytes", d.config.Path, off, size)
	}
	if left := size - off; int64(len(p)) > left {
		p, err = p[:left], io.EOF
	}
	if len(p) == 0 {
		return 0, err
	}
	if err := d.image.read([][]byte{p}, off, new(scratch)); err != nil {
		return 0, fmt.Errorf("disk %s: read at %d: %w", d.config.Path, off, err)
	}
	return len(p), err
}
