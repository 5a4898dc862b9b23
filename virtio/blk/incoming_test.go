package blk

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/virtio"
	"golang.org/x/sys/unix"
)

// openCopy opens the file of a disk that is copied.
func openCopy(t *testing.T, path string, size uint64) *Device {
	t.Helper()
	d, err := OpenCopy(Config{Path: path, Copy: true}, size, nil)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func names(t *testing.T, dir string) (list []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

// A copy has its name when its guest runs, and leaves nothing behind before.
func TestCopyGetsItsName(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.img")
	d := openCopy(t, path, 1<<20)
	if err := errors.Join(d.Reserve(0, 1<<20), d.Write([]byte("content"), 512), d.Write([]byte("old"), 64<<10), d.Zero(64<<10, 64<<10), d.Sync()); err != nil {
		t.Fatal(err)
	}
	if got := names(t, dir); len(got) != 0 {
		t.Errorf("before the guest runs there is %q", got)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if got := names(t, dir); len(got) != 0 {
		t.Errorf("after an attempt there is %q", got)
	}
	d = openCopy(t, path, 1<<20)
	if err := errors.Join(d.Write([]byte("content"), 512), d.Lock(), d.Lock()); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil || len(b) != 1<<20 || !bytes.HasPrefix(b[512:], []byte("content")) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if got := names(t, dir); len(got) != 1 {
		t.Errorf("there is %q", got)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		t.Fatal(err)
	}
}

// Content that is whole blocks passes by the page cache, where the file system can do that;
// all of it is there in the end, from wherever in memory it came.
func TestCopyPassesTheCache(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.img")
	const size = 4<<20 + 512
	d := openCopy(t, path, size)
	if d.image.incoming.past < 0 {
		t.Errorf("%s is not written past the page cache: this file system cannot?", path)
	}
	content := make([]byte, size+1)
	for i := range content {
		content[i] = byte(i/4096 + i)
	}
	whole := content[1:] // not aligned
	aligned := new(scratch).buffer()
	err := errors.Join(d.Reserve(0, size), d.Write(whole[:1<<20], 0))
	for off := 1 << 20; off < size; off += len(aligned) {
		n := copy(aligned, whole[off:])
		err = errors.Join(err, d.Write(aligned[:n], uint64(off)))
	}
	copy(aligned, whole)
	if err = errors.Join(err, d.Write(aligned[:8192], 0), d.Zero(64<<10, 64<<10), d.Write(whole[64<<10:128<<10], 64<<10), d.Sync(), d.Lock(), d.Close()); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, whole) {
		t.Errorf("%d bytes, %v, or others than were written", len(got), err)
	}
}

// What is there stays, unless its guest has moved away with a copy: that is marked, not
// started again by mistake, and replaced.
func TestMovedImages(t *testing.T) {
	path := newImage(t, 1<<20)
	if _, err := OpenCopy(Config{Path: path, Copy: true}, 1<<20, nil); err == nil || !strings.Contains(err.Error(), "it exists") {
		t.Fatalf("over another disk: %v", err)
	}
	d := open(t, Config{Path: path})
	if err := errors.Join(d.Lock(), d.StartBlockLog(64<<10), d.Unlock()); err != nil {
		t.Fatal(err)
	}
	if !isMoved(path) {
		t.Fatal("the image is not marked: this file system has no extended attributes?")
	}
	start := func(c Config) error {
		b, err := (&Spec{Config: c}).Open(nil)
		if err == nil {
			err = errors.Join(b.(*backend).Lock(), b.Close())
		}
		return err
	}
	if err := start(Config{Path: path}); !errors.Is(err, ErrMoved) || !strings.Contains(err.Error(), "--force") {
		t.Errorf("the old copy: %v", err)
	}
	// The source takes its guest back.
	if err := d.Lock(); err != nil || isMoved(path) {
		t.Errorf("taken back: %v, marked %v", err, isMoved(path))
	}
	if err := d.Unlock(); err != nil {
		t.Fatal(err)
	}
	next := openCopy(t, path, 2<<20)
	if err := next.Lock(); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Size() != 2<<20 || isMoved(path) {
		t.Errorf("replaced: %v, %v", st, err)
	}
	next.StopBlockLog()
	if err := errors.Join(next.StartBlockLog(64<<10), next.Unlock(), next.Close()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(start(Config{Path: path, Force: true}), start(Config{Path: path})); err != nil {
		t.Errorf("by force, and then without: %v", err)
	}
}

// A full file system is said to the source, and not where.
func TestCopyWithoutRoom(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("SKIPPED: needs root, to mount a tmpfs: %v", err)
	}
	defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()
	d := openCopy(t, filepath.Join(dir, "a.img"), 64<<20)
	err := d.Reserve(0, 32<<20)
	var told interface{ ForPeer() string }
	if !errors.Is(err, unix.ENOSPC) || !errors.As(err, &told) || !strings.Contains(told.ForPeer(), "no space left") || strings.Contains(told.ForPeer(), dir) {
		t.Errorf("reserve: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// Each request that changes blocks is recorded before the guest hears that it is done.
func TestEveryChangeIsRecorded(t *testing.T) {
	d := open(t, Config{Path: newImage(t, 1<<20)})
	r := newRig(t, d, virtio.FeatureVersion1|FeatureDiscard|FeatureWriteZeroes|FeatureFlush)
	if err := d.StartBlockLog(64 << 10); err != nil {
		t.Fatal(err)
	}
	for i, kind := range []uint32{typeOut, typeDiscard, typeWriteZeroes} {
		n := 4096
		if kind != typeOut {
			r.putRange(0, uint64(128*(i+1)), 8, 0)
			n = rangeSize
		}
		status, _ := r.do(kind, uint64(128*(i+1)), n, false)
		want(t, "change", status, statusOK)
		var got uint64
		d.FetchBlocks(func(w int, word uint64) { got |= word })
		if got != 1<<(i+1) {
			t.Errorf("request of type %d: recorded %#x", kind, got)
		}
	}
}

// The record has each block that changes, once, in any way.
func TestBlockLog(t *testing.T) {
	d := open(t, Config{Path: newImage(t, 1<<20)})
	take := func() (list []int) {
		d.FetchBlocks(func(w int, word uint64) {
			for b := range 64 {
				if word>>b&1 != 0 {
					list = append(list, 64*w+b)
				}
			}
		})
		return list
	}
	d.changed(0, 512)
	if got := take(); got != nil {
		t.Errorf("without a record: %v", got)
	}
	if err := d.StartBlockLog(4096); err != nil {
		t.Fatal(err)
	}
	d.changed(4095, 1)
	d.changed(4096, 4097)
	d.changed(1<<20-512, 512)
	d.changed(8192, 0)
	if got := take(); len(got) != 4 || got[0] != 0 || got[1] != 1 || got[2] != 2 || got[3] != 255 {
		t.Errorf("recorded: %v", got)
	}
	if got := take(); got != nil {
		t.Errorf("recorded twice: %v", got)
	}
	if start, end, err := d.NextData(0); err != nil || start > end || end > 1<<20 {
		t.Errorf("data at %d to %d, %v", start, end, err)
	}
	if d.StartBlockLog(3000) == nil {
		t.Error("blocks of 3000 bytes")
	}
}
