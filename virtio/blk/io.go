package blk

import (
	"errors"
	"io"
	"unsafe"

	"golang.org/x/sys/unix"
)

// bounceSize is the size of a bounce buffer.
const bounceSize = 1 << 20

// scratch holds the buffers of a transfer. A worker reuses its own.
type scratch struct {
	iov    []unix.Iovec
	one    [1][]byte
	part   [][]byte
	bounce []byte // bounceSize bytes at a multiple of maxBlock; nil until needed
}

func (s *scratch) buffer() []byte {
	if s.bounce == nil {
		b := make([]byte, bounceSize+maxBlock)
		skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (maxBlock - 1)
		s.bounce = b[skip : skip+bounceSize : skip+bounceSize]
	}
	return s.bounce
}

// read fills all of bufs from the image at off.
func (im *image) read(bufs [][]byte, off int64, s *scratch) error {
	if im.over != nil {
		return im.readOver(bufs, off, s)
	}
	if im.aligned(bufs, off) {
		return im.transfer(unix.SYS_PREADV2, bufs, off, 0, s)
	}
	align := int64(im.offsetAlign)
	left := total(bufs)
	done := 0
	for left > 0 {
		start := off &^ (align - 1)
		n := min(left, bounceSize-int(off-start))
		block := s.buffer()[:roundUp(int(off-start)+n, int(align))]
		if err := im.transferOne(unix.SYS_PREADV2, block, start, 0, s); err != nil {
			return err
		}
		copyTo(bufs, done, block[off-start:int(off-start)+n])
		done, off, left = done+n, off+int64(n), left-n
	}
	return nil
}

// write writes all of bufs to the image at off. If durable is set, the data is on
// the storage when write returns.
func (im *image) write(bufs [][]byte, off int64, durable bool, s *scratch) error {
	if im.over != nil {
		return im.writeOver(bufs, off, s)
	}
	if !durable {
		return im.put(bufs, off, 0, s)
	}
	if err := im.put(bufs, off, unix.RWF_DSYNC, s); err != nil {
		return err
	}
	return im.named()
}

// put is write with the flags of pwritev2(2).
func (im *image) put(bufs [][]byte, off int64, flags int, s *scratch) error {
	if im.aligned(bufs, off) {
		im.blocks.RLock()
		defer im.blocks.RUnlock()
		return im.transfer(unix.SYS_PWRITEV2, bufs, off, flags, s)
	}
	align := int64(im.offsetAlign)
	left := total(bufs)
	if off%align == 0 && left%im.offsetAlign == 0 {
		// Whole blocks: only the memory is not aligned.
		im.blocks.RLock()
		defer im.blocks.RUnlock()
	} else {
		im.blocks.Lock()
		defer im.blocks.Unlock()
	}
	done := 0
	for left > 0 {
		start := off &^ (align - 1)
		n := min(left, bounceSize-int(off-start))
		block := s.buffer()[:roundUp(int(off-start)+n, int(align))]
		if off != start || n%im.offsetAlign != 0 {
			if err := im.transferOne(unix.SYS_PREADV2, block, start, 0, s); err != nil {
				return err
			}
		}
		copyFrom(block[off-start:int(off-start)+n], bufs, done)
		if err := im.transferOne(unix.SYS_PWRITEV2, block, start, flags, s); err != nil {
			return err
		}
		done, off, left = done+n, off+int64(n), left-n
	}
	return nil
}

// aligned reports whether the kernel takes bufs as they are.
func (im *image) aligned(bufs [][]byte, off int64) bool {
	if im.offsetAlign == 1 {
		return true
	}
	if off&int64(im.offsetAlign-1) != 0 {
		return false
	}
	for _, b := range bufs {
		if len(b)&(im.offsetAlign-1) != 0 || int(uintptr(unsafe.Pointer(unsafe.SliceData(b))))&(im.memAlign-1) != 0 {
			return false
		}
	}
	return true
}

func (im *image) transferOne(call uintptr, b []byte, off int64, flags int, s *scratch) error {
	s.one[0] = b
	err := im.transfer(call, s.one[:], off, flags, s)
	s.one[0] = nil
	return err
}

// transfer is preadv2(2) or pwritev2(2) of all of bufs. It returns
// io.ErrUnexpectedEOF if the file has become shorter.
func (im *image) transfer(call uintptr, bufs [][]byte, off int64, flags int, s *scratch) error {
	s.iov = s.iov[:0]
	for _, b := range bufs {
		if len(b) > 0 {
			s.iov = append(s.iov, unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))})
		}
	}
	iov := s.iov
	for len(iov) > 0 {
		n, _, errno := unix.Syscall6(call, uintptr(im.fd), uintptr(unsafe.Pointer(unsafe.SliceData(iov))),
			uintptr(len(iov)), uintptr(off), 0, uintptr(flags))
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return errno
		case n == 0:
			return io.ErrUnexpectedEOF
		}
		off += int64(n)
		for n > 0 {
			if uint64(n) < iov[0].Len {
				iov[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(iov[0].Base), n))
				iov[0].Len -= uint64(n)
				break
			}
			n -= uintptr(iov[0].Len)
			iov = iov[1:]
		}
	}
	clear(s.iov) // keep no pointers to guest memory
	return nil
}

// zero makes [off, off+n) read as zeros. With unmap it may free the storage. It
// writes zeros only if the storage cannot make them.
func (im *image) zero(off, n int64, unmap, durable bool, s *scratch) error {
	im.blocks.RLock()
	err := im.fallocateZero(off, n, unmap)
	im.blocks.RUnlock()
	if err == nil {
		if durable {
			err = im.flush()
		}
		return err
	}
	if !unsupported(err) {
		return err
	}
	zeros := make([]byte, min(n, bounceSize))
	for n > 0 {
		m := min(n, bounceSize)
		if err := im.write([][]byte{zeros[:m]}, off, durable, s); err != nil {
			return err
		}
		off, n = off+m, n-m
	}
	return nil
}

func (im *image) fallocateZero(off, n int64, unmap bool) error {
	if im.over != nil {
		return im.punchOver(off, n)
	}
	const keep = unix.FALLOC_FL_KEEP_SIZE
	if unmap {
		if err := im.fallocate(unix.FALLOC_FL_PUNCH_HOLE|keep, off, n); err == nil || !unsupported(err) {
			return err
		}
	}
	return im.fallocate(unix.FALLOC_FL_ZERO_RANGE|keep, off, n)
}

func (im *image) fallocate(mode uint32, off, n int64) error {
	_, err := retry(func() (int, error) { return 0, unix.Fallocate(im.fd, mode, off, n) })
	return err
}

// discard tells the storage that the content of [off, off+n) is not needed.
// Storage that does not support it is not an error.
func (im *image) discard(off, n int64) error {
	im.blocks.RLock()
	defer im.blocks.RUnlock()
	var err error
	if im.over != nil {
		err = im.punchOver(off, n)
	} else if im.device {
		block := int64(im.topology.BlockSize)
		end := (off + n) &^ (block - 1)
		off = (off + block - 1) &^ (block - 1)
		if off >= end {
			return nil
		}
		// linux/fs.h: BLKDISCARD takes the start and the length in bytes.
		span := [2]uint64{uint64(off), uint64(end - off)}
		_, err = retry(func() (int, error) {
			if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(im.fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(&span))); errno != 0 {
				return 0, errno
			}
			return 0, nil
		})
	} else {
		err = im.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	}
	if unsupported(err) {
		return nil
	}
	return err
}

func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENOTTY)
}

func total(bufs [][]byte) int {
	n := 0
	for _, b := range bufs {
		n += len(b)
	}
	return n
}

func roundUp(n, align int) int { return (n + align - 1) &^ (align - 1) }

// copyTo copies p to bufs, as if they were contiguous, starting at off.
func copyTo(bufs [][]byte, off int, p []byte) {
	for _, b := range bufs {
		if off >= len(b) {
			off -= len(b)
			continue
		}
		p = p[copy(b[off:], p):]
		off = 0
	}
}

// copyFrom fills p from bufs, as if they were contiguous, starting at off.
func copyFrom(p []byte, bufs [][]byte, off int) {
	for _, b := range bufs {
		if off >= len(b) {
			off -= len(b)
			continue
		}
		p = p[copy(p, b[off:]):]
		off = 0
	}
}
