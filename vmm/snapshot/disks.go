package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/vmm/memory"
	"golang.org/x/sys/unix"
)

// canRead reports early why the image of a disk cannot be kept.
func (d *draft) canRead(i int) error {
	f, err := openImage(d.disks[i].Path)
	if err != nil {
		return err
	}
	return f.Close()
}

// Clones says whether the images at paths can be cloned into the directory of dir; if not,
// copying them takes as long as it takes, while the guest stands still.
func Clones(dir string, paths []string) bool {
	for _, path := range paths {
		in, err := openImage(path)
		if err != nil {
			return false
		}
		out, err := os.CreateTemp(filepath.Dir(dir), draftPrefix)
		if err == nil {
			err = errors.Join(unix.IoctlFileClone(int(out.Fd()), int(in.Fd())), out.Close(), os.Remove(out.Name()))
		}
		_ = in.Close()
		if err != nil {
			return false
		}
	}
	return true
}

// Patience is how long a guest may stand still for its disks.
func Patience(disks Disks, clones bool) time.Duration {
	switch {
	case disks == DisksNone || disks == "":
		return 0
	case disks == DisksReflink && clones:
		return time.Minute
	}
	return 24 * time.Hour
}

// openImage opens a disk's image for reading.
func openImage(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("keep the guest's disk: %w", err)
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		_ = f.Close()
		return nil, fmt.Errorf("keep the guest's disk %s: expected a file: a block device has no clone, and is left out by --disks none", path)
	}
	return f, nil
}

// keepDisks clones or copies the images, while the guest stands still. What it wrote is in
// the host's cache, at least, and this host reads it there.
func (d *draft) keepDisks(ctx context.Context) error {
	if d.k.opt.Disks == DisksNone {
		return nil
	}
	var all, kept uint64
	for _, disk := range d.disks {
		all += disk.Bytes
	}
	done := d.k.begins("copying disks", all)
	defer d.k.begins("", 0)
	for i := range d.disks {
		disk := &d.disks[i]
		how, err := keepImage(ctx, disk.Path, filepath.Join(d.dir, diskFile(i)), int64(disk.Bytes), d.k.opt.Disks, done)
		if err != nil {
			return err
		}
		disk.Kept = how
		kept += disk.Bytes
		done.Store(kept)
	}
	return nil
}

// dropDisks undoes keepDisks: the guest goes on, and writes its disks.
func (d *draft) dropDisks() error {
	var errs []error
	for i := range d.disks {
		if err := os.Remove(filepath.Join(d.dir, diskFile(i))); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// syncDisks makes what is kept durable.
func (d *draft) syncDisks() error {
	if d.k.opt.Disks == DisksNone {
		return nil
	}
	for i := range d.disks {
		f, err := os.Open(filepath.Join(d.dir, diskFile(i)))
		if err == nil {
			err = errors.Join(f.Sync(), f.Close())
		}
		if err != nil {
			return fmt.Errorf("make the disk durable: %w", err)
		}
	}
	return nil
}

// keepImage makes a clone of an image at path to, or a copy, and returns which. The file
// must not exist.
func keepImage(ctx context.Context, from, to string, size int64, how Disks, done *atomic.Uint64) (Disks, error) {
	in, err := openImage(from)
	if err != nil {
		return how, err
	}
	defer in.Close()
	how, err = cloneImage(ctx, in, to, size, how, done)
	if err != nil {
		return how, fmt.Errorf("keep the guest's disk %s: %w", from, err)
	}
	return how, nil
}

// cloneImage is keepImage for an image that is open. done counts the bytes that are done.
func cloneImage(ctx context.Context, in *os.File, to string, size int64, how Disks, done *atomic.Uint64) (Disks, error) {
	out, err := os.OpenFile(to, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return how, err
	}
	if how == DisksReflink {
		if err = unix.IoctlFileClone(int(out.Fd()), int(in.Fd())); err != nil {
			how = DisksCopy // another file system, or one without clones
		}
	}
	if how == DisksCopy {
		err = copyImage(ctx, in, out, size, done)
	}
	if st, serr := out.Stat(); err == nil && serr == nil && st.Size() != size {
		err = fmt.Errorf("expected %d bytes, found %d", size, st.Size())
	}
	if err = errors.Join(err, out.Close()); err != nil {
		_ = os.Remove(to)
		return how, err
	}
	return how, nil
}

// MakeDisks makes disks for one VM, of the name, in a directory: clones of those in the
// snapshot, or copies where the file system has no clones. A disk that the guest cannot
// write is the snapshot's own. They are what a machine gets of its host. undo removes them.
func (s *Snapshot) MakeDisks(ctx context.Context, dir, name string) (disks []virtio.Spec, undo func(), err error) {
	var made []string
	undo = func() {
		for _, path := range made {
			_ = os.Remove(path)
		}
	}
	defer func() {
		if err != nil {
			undo()
			err = fmt.Errorf("snapshot %s: make the disks of %s: %w", s.dir, name, err)
		}
	}()
	for i, d := range s.Disks {
		if d.Kept == DisksNone {
			return nil, undo, fmt.Errorf("disk %d, %s, is not in the snapshot (--disks none)", i, d.Path)
		}
		path := filepath.Join(s.dir, diskFile(i))
		in, err := s.openFile(diskFile(i))
		if err != nil {
			return nil, undo, err
		}
		if st, serr := in.Stat(); serr != nil || st.Size() != int64(d.Bytes) {
			err = damaged("%s: expected %d bytes", diskFile(i), d.Bytes)
		} else if !d.ReadOnly {
			path = filepath.Join(dir, name+"-"+diskFile(i))
			if _, err = cloneImage(ctx, in, path, int64(d.Bytes), DisksReflink, new(atomic.Uint64)); err == nil {
				made = append(made, path)
			}
		}
		if err = errors.Join(err, in.Close()); err != nil {
			return nil, undo, err
		}
		disks = append(disks, &blk.Spec{Config: blk.Config{Path: path, ReadOnly: d.ReadOnly, Copied: true}})
	}
	return disks, undo, nil
}

// copyImage copies what is no hole.
func copyImage(ctx context.Context, in, out *os.File, size int64, done *atomic.Uint64) error {
	if err := out.Truncate(size); err != nil {
		return err
	}
	before := done.Load()
	return memory.Extents(int(in.Fd()), 0, size, func(from, to int64) error {
		const step = 64 << 20
		for from < to {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			at, there := from, from
			n, err := unix.CopyFileRange(int(in.Fd()), &at, int(out.Fd()), &there, int(min(step, to-from)), 0)
			if err != nil || n == 0 { // other file systems: by hand
				var some int64
				some, err = io.Copy(io.NewOffsetWriter(out, from), io.NewSectionReader(in, from, min(step, to-from)))
				if n = int(some); err == nil && n == 0 {
					err = io.ErrUnexpectedEOF
				}
			}
			if err != nil {
				return err
			}
			from += int64(n)
			done.Store(before + uint64(from))
		}
		return nil
	})
}
