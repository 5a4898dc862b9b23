package blk

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

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

// A flush that fails is not forgotten before the driver starts anew.
func TestFlushFails(t *testing.T) {
	d := open(t, Config{Path: newImage(t, 64<<10)})
	if err := d.Lock(); err != nil {
		t.Fatal(err)
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	good := d.image.fd
	d.image.fd = pipe[1] // which has nothing to flush, and says so
	if err := d.flush(); err == nil {
		t.Fatal("a pipe was flushed")
	}
	d.image.fd = good
	if err := d.Unlock(); err == nil {
		t.Fatal("unlocked after a flush that failed")
	}
	r := newRig(t, d, layouts["split"])
	status, _ := r.do(typeFlush, 0, 0, false)
	want(t, "flush after one that failed", status, statusIOErr)
	if d.Stats().Errors != 1 {
		t.Errorf("counters %+v", d.Stats())
	}
	d.Reset()
	if err := d.Unlock(); err != nil {
		t.Fatal(err)
	}
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
