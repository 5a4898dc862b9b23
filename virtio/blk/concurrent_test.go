package blk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// A request that takes its time does not keep the next one waiting.
func TestInFlight(t *testing.T) {
	d := open(t, Config{Path: newImage(t, 64<<10)})
	r := newRig(t, d, layouts["split event_idx"])
	d.image.blocks.Lock() // no write gets through
	write := r.send(0, r.free, typeOut, 0, virtiotest.Buffer{GPA: r.free + 4096, Len: 512}, false)
	for i := range uint64(4) {
		read := r.send(0, r.free+8192, typeIn, i, virtiotest.Buffer{GPA: r.free + 12288, Len: 512}, true)
		if u := r.wait(0); u.Token != read.token {
			t.Errorf("request %d came back, not %d", u.Token, read.token)
		}
	}
	d.image.blocks.Unlock()
	if u := r.wait(0); u.Token != write.token {
		t.Errorf("request %d came back, not %d", u.Token, write.token)
	}
}

// failing makes the next flushes of the storage fail, as the kernel reports a lost
// write: once. Something has been written.
func failing(d *Device, times int) {
	d.flushes.changed.Add(1)
	d.image.fdatasync = func(fd int) error {
		if times <= 0 {
			return unix.Fdatasync(fd)
		}
		times--
		return unix.EIO
	}
}

// A flush that fails is the guest's to know. When it has been told, the disk is as
// good as its storage.
func TestFlushFails(t *testing.T) {
	d := open(t, Config{Path: newImage(t, 64<<10)})
	if err := d.Lock(); err != nil {
		t.Fatal(err)
	}
	flush := func(r *rig, what string, expected byte) {
		t.Helper()
		status, _ := r.do(typeFlush, 0, 0, false)
		want(t, what, status, expected)
	}
	r := newRig(t, d, layouts["split"])

	// The guest finds it.
	failing(d, 1)
	flush(r, "a flush that fails", statusIOErr)
	if err := d.Sync(); err != nil {
		t.Fatalf("the guest was told, and the storage is well: %v", err)
	}
	flush(r, "the next one", statusOK)

	// A migration finds it, while the guest runs or stands still.
	failing(d, 1)
	for range 3 {
		if err := d.Sync(); !errors.Is(err, unix.EIO) || !strings.Contains(err.Error(), "the guest learns of it") {
			t.Fatalf("the guest was not told: %v", err)
		}
	}
	if err := d.Unlock(); !errors.Is(err, unix.EIO) {
		t.Fatalf("unlocked before the guest was told: %v", err)
	}
	flush(r, "the guest's next flush", statusIOErr)
	flush(r, "the one after it", statusOK)
	if err := d.Sync(); err != nil {
		t.Fatalf("the guest was told, and the storage is well: %v", err)
	}

	// As long as the storage is not well nothing is.
	failing(d, 4)
	for range 2 {
		if err := d.Sync(); err == nil {
			t.Fatal("durable without storage")
		}
		flush(r, "a flush that fails", statusIOErr)
	}
	flush(r, "a flush of what is well", statusOK)
	if got := d.Stats().Errors; got != 4 {
		t.Errorf("%d errors counted", got)
	}

	// A driver that starts anew expects nothing of what was.
	failing(d, 1)
	if err := d.Sync(); err == nil {
		t.Fatal("durable without storage")
	}
	d.Reset()
	if err := d.Unlock(); err != nil {
		t.Fatal(err)
	}
}

// A driver that does not flush is told by its next write.
func TestFlushFailsWriteThrough(t *testing.T) {
	d := open(t, Config{Path: newImage(t, 64<<10)})
	r := newRig(t, d, layouts["split"])
	d.WriteConfig(offWriteback, []byte{0})
	failing(d, 1)
	if err := d.Sync(); err == nil {
		t.Fatal("durable without storage")
	}
	for _, expected := range []byte{statusIOErr, statusOK} {
		status, _ := r.do(typeOut, 0, 512, true)
		want(t, "write", status, expected)
	}
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
}

// The kernel tells one of the flushes that wait for the same writes of their loss:
// all of them are told here, and one for which the loss was before it is not.
func TestFlushFailsForAll(t *testing.T) {
	d := open(t, Config{Path: newImage(t, 64<<10)})
	const others = 8
	began, fail := make(chan struct{}), make(chan struct{})
	var calls atomic.Int32
	d.image.fdatasync = func(int) error {
		if calls.Add(1) == 1 {
			close(began)
			<-fail
			return unix.EIO
		}
		return nil
	}
	errs := make(chan error, others+1)
	flush := func() { errs <- d.flush(true) }
	go flush()
	<-began
	for range others {
		go flush()
	}
	// Each of them has begun when it cannot have the mutex.
	for deadline := time.Now().Add(testenv.Patience); waiters(t) < others; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the flushes do not begin")
		}
	}
	close(fail)
	for range others + 1 {
		if err := <-errs; !errors.Is(err, unix.EIO) {
			t.Errorf("a flush that waited with one that failed: %v", err)
		}
	}
	if n := calls.Load(); n != 2 {
		t.Errorf("%d flushes that waited together became %d of the storage, want 1", others, n-1)
	}
	if err := d.flush(true); err != nil {
		t.Errorf("a flush after one that failed: %v", err)
	}
}

// waiters counts the goroutines that wait in flush for another one.
func waiters(t *testing.T) (n int) {
	t.Helper()
	b := make([]byte, 1<<20)
	for g := range strings.SplitSeq(string(b[:runtime.Stack(b, true)]), "\n\n") {
		if strings.Contains(g, "[sync.Mutex.Lock") && strings.Contains(g, "(*Device).flush(") {
			n++
		}
	}
	return n
}

// The limits of discard and write-zeroes are those that the driver was told,
// on a disk that is larger.
func TestRangeLimits(t *testing.T) {
	path := newImage(t, 64<<10)
	if err := os.Truncate(path, 4<<30); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, open(t, Config{Path: path}), layouts["split"])
	for kind, most := range map[uint32]uint32{typeDiscard: maxDiscardSectors, typeWriteZeroes: maxZeroSectors} {
		r.putRange(0, 8, most+1, 0)
		status, _ := r.do(kind, 0, rangeSize, false)
		want(t, "too many sectors", status, statusIOErr)
		r.putRange(0, 8, most, 0)
		status, _ = r.do(kind, 0, rangeSize, false)
		want(t, "as many as there may be", status, statusOK)
	}
}

// What the guest has not written since the last flush is not flushed again: the stop of a
// migration has only the rest to wait for. The guest's own flush always reaches the storage.
func TestACleanDiskIsNotFlushed(t *testing.T) {
	d := open(t, Config{Path: newImage(t, 64<<10)})
	if err := d.Lock(); err != nil {
		t.Fatal(err)
	}
	calls, fails := 0, false
	d.image.fdatasync = func(int) error {
		if calls++; fails {
			return unix.EIO
		}
		return nil
	}
	r := newRig(t, d, layouts["split"])
	sync := func(what string, expected int) {
		t.Helper()
		if err := d.Sync(); (err != nil) != fails || calls != expected {
			t.Errorf("%s: %v, %d flushes of the storage, want %d", what, err, calls, expected)
		}
	}
	change := func(typ uint32) {
		t.Helper()
		n := 512
		if typ != typeOut {
			n = rangeSize
			clear(r.data(n))
			r.data(n)[8] = 8 // sectors, from the first one
		}
		status, _ := r.do(typ, 0, n, false)
		want(t, fmt.Sprintf("request of type %d", typ), status, statusOK)
	}
	sync("nobody knows what was written before", 1)
	sync("clean", 1)
	for i, typ := range []uint32{typeOut, typeDiscard, typeWriteZeroes} {
		change(typ)
		sync("after a request", i+2)
		sync("clean again", i+2)
	}
	r.do(typeFlush, 0, 0, false)
	if calls != 5 {
		t.Error("the guest's flush did not reach the storage")
	}
	change(typeOut)
	fails = true
	sync("a flush that fails", 6)
	sync("and is made again", 7)
	fails = false
	r.do(typeFlush, 0, 0, false) // the guest is told
}

// The unlock of a disk whose storage does not answer ends with its context, and has not
// unlocked.
func TestUnlockOfAHungDisk(t *testing.T) {
	path := newImage(t, 64<<10)
	b, err := (&Spec{Config: Config{Path: path}}).Open(nil)
	if err != nil {
		t.Fatal(err)
	}
	d := b.(*backend)
	answers, asked := make(chan struct{}), make(chan struct{}, 2)
	d.image.fdatasync = func(int) error {
		asked <- struct{}{}
		<-answers
		return nil
	}
	if err := d.Lock(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	late := errors.New("too late")
	go func() {
		<-asked
		cancel(late)
	}()
	if err := d.Unlock(ctx); !errors.Is(err, late) || !strings.Contains(err.Error(), path) {
		t.Errorf("unlock: %v", err)
	}
	other, err := Open(Config{Path: path}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := other.Lock(); !errors.Is(err, ErrInUse) {
		t.Errorf("the disk is not locked any more: %v", err)
	}
	close(answers)
	if err := d.Unlock(t.Context()); err != nil {
		t.Error(err)
	}
	if err := other.Lock(); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// The same on storage that is really full, and then is not: a loop device over a file
// on a file system with too little room.
func TestFlushFailsOnStorage(t *testing.T) {
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=1M", "none", dir).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: needs root: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	path := filepath.Join(dir, "disk.img")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 4<<20)); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", path).CombinedOutput()
	if err != nil {
		t.Skipf("SKIPPED: needs loop devices: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	d := open(t, Config{Path: dev})
	r := newRig(t, d, layouts["split"])
	fill := func() {
		for sector := uint64(0); sector < 4<<20/SectorSize; sector += 128 {
			copy(r.data(64<<10), bytes.Repeat([]byte{0x55}, 64<<10))
			status, _ := r.do(typeOut, sector, 64<<10, false)
			want(t, "a write to the cache", status, statusOK)
		}
	}
	flush := func(what string, expected byte) {
		t.Helper()
		status, _ := r.do(typeFlush, 0, 0, false)
		want(t, what, status, expected)
	}
	fill()
	if err := d.Sync(); err == nil {
		t.Fatal("4 MiB are durable on 1 MiB")
	}
	if out, err := exec.Command("mount", "-o", "remount,size=16M", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := d.Sync(); err == nil {
		t.Fatal("the guest was not told, and may move")
	}
	flush("the guest is told", statusIOErr)
	if err := d.Sync(); err != nil {
		t.Fatalf("the guest was told, and there is room: %v", err)
	}
	fill()
	flush("there is room", statusOK)
}
