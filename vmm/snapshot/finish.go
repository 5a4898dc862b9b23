package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/vmm/memory"
	"golang.org/x/sys/unix"
)

// finish writes what is left, makes all durable, and gives the snapshot its name. The
// guest does not wait for it, unless it is to end with it.
func (d *draft) finish(ctx context.Context) error {
	m := &d.manifest
	m.Session, m.Disks = d.sessionText(), append(m.Disks, d.disks...)
	m.Created = time.Now().UTC().Round(time.Second)
	if err := d.write(stateFile, d.state); err != nil {
		return err
	}
	if err := d.write(hotFile, encodeHot(hotRanges(d.hot))); err != nil {
		return err
	}
	if len(d.storage) > 0 {
		if err := d.write(storageFile, d.storage); err != nil {
			return err
		}
	}
	if err := d.finishMemory(ctx); err != nil {
		return err
	}
	b, err := m.encode()
	if err != nil {
		return err
	}
	if err := d.write(manifestFile, b); err != nil {
		return err
	}
	delete(m.Parts, manifestFile)
	if err := d.syncDisks(); err != nil {
		return err
	}
	if err := syncDir(d.dir); err != nil {
		return err
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return d.rename()
}

// finishMemory makes the memory durable, packs it if that is asked for, and makes its sum.
func (d *draft) finishMemory(ctx context.Context) (err error) {
	ram := &d.manifest.Memory
	done := d.k.begins("writing memory", ram.Bytes)
	defer d.k.begins("", 0)
	if d.k.opt.Compress == CompressZstd {
		if err := d.pack(ctx, done); err != nil {
			return err
		}
	} else {
		var pages uint64
		if ram.SHA256, pages, err = d.sum(ctx, done); err != nil {
			return d.failed("write and read back", err)
		}
		if err := d.memory.Sync(); err != nil {
			return d.failed("write", err)
		}
		ram.DataBytes = pages << mempage.Shift
	}
	if err := d.memory.Close(); err != nil {
		return d.failed("close", err)
	}
	if d.manifest.packed() {
		return os.Remove(d.memory.Name())
	}
	return nil
}

// sum makes the sum of memory, unit by unit once that is on the disk.
func (d *draft) sum(ctx context.Context, done *atomic.Uint64) (sum string, pages uint64, err error) {
	return inUnits(d.manifest.Memory.Bytes, runtime.GOMAXPROCS(0), done, func(start, end int64) (unitSum, error) {
		if err := d.settle(start, end); err != nil {
			return unitSum{}, err
		}
		return sumUnitOf(ctx, d.memory, start, end)
	})
}

// settle waits until a part of memory is on the disk, so that it is known how much is left;
// durable it is with the file.
func (d *draft) settle(start, end int64) error {
	err := unix.SyncFileRange(int(d.memory.Fd()), start, end-start, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
	if errors.Is(err, unix.EIO) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) { // fsync tells them no more
		return err
	}
	return nil // a file system may not know it
}

// readMost is how much of a file is read at once.
const readMost = 1 << 20

// sumMemory reads a file of memory and makes its sum.
func sumMemory(ctx context.Context, f *os.File, size uint64, workers int, done *atomic.Uint64) (sum string, pages uint64, err error) {
	return inUnits(size, workers, done, func(start, end int64) (unitSum, error) { return sumUnitOf(ctx, f, start, end) })
}

// sumUnitOf reads a unit of a file of memory and makes its sum.
func sumUnitOf(ctx context.Context, f *os.File, start, end int64) (unitSum, error) {
	s, buf := newSummer(), make([]byte, readMost)
	err := eachChunk(int(f.Fd()), start, end, func(from, to int64) error {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		b := buf[:to-from]
		if _, err := f.ReadAt(b, from); err != nil {
			return err
		}
		s.add(b, uint64(from)>>mempage.Shift)
		return nil
	})
	return s.end(), err
}

// eachChunk calls found for what is no hole in [start, end) of a file, in whole pages and
// at most readMost at once.
func eachChunk(fd int, start, end int64, found func(from, to int64) error) error {
	done := start // blocks of the file system may be smaller than a page
	return memory.Extents(fd, start, end, func(from, to int64) error {
		from = max(done, from&^(mempage.Size-1))
		to = min((to+mempage.Size-1)&^(mempage.Size-1), end)
		for ; from < to; from += readMost {
			if err := found(from, min(from+readMost, to)); err != nil {
				return err
			}
		}
		done = max(done, to)
		return nil
	})
}

// rename gives the directory its name, durably.
func (d *draft) rename() error {
	d.tempMu.Lock()
	defer d.tempMu.Unlock()
	err := unix.Renameat2(unix.AT_FDCWD, d.dir, unix.AT_FDCWD, d.k.dir, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // the file system does not know it
		if _, err = os.Lstat(d.k.dir); err == nil {
			err = unix.EEXIST
		} else {
			err = unix.Rename(d.dir, d.k.dir)
		}
	}
	if err != nil {
		return fmt.Errorf("give the snapshot its name, %s: %w", d.k.dir, err)
	}
	if err := syncDir(filepath.Dir(d.k.dir)); err != nil {
		return errors.Join(err, os.Rename(d.k.dir, d.dir))
	}
	d.kept = true
	return nil
}

// remove takes the name away again, and removes the snapshot.
func (d *draft) remove() error {
	if err := os.Rename(d.k.dir, d.dir); err != nil {
		return err
	}
	return os.RemoveAll(d.dir)
}

func syncDir(path string) error {
	f, err := os.Open(path)
	if err == nil {
		err = errors.Join(f.Sync(), f.Close())
	}
	if err != nil {
		return fmt.Errorf("make the directory durable: %w", err)
	}
	return nil
}
