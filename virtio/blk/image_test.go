package blk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	disks "github.com/govmm/govmm/image"
	"golang.org/x/sys/unix"
)

// What is no raw image is refused in one line that says how to make one.
func TestFormats(t *testing.T) {
	for _, f := range disks.Magics {
		advice := converted[f.Format]
		if advice == "" {
			advice = "qemu-img convert -f " + f.Format + " -O raw %s %s"
		}
		path := newImage(t, 1<<20)
		file, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		off := int64(f.Offset)
		if f.AtEnd {
			off += 1<<20 - 512
		}
		if _, err := file.WriteAt([]byte(f.Bytes), off); err != nil {
			t.Fatal(err)
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
		for _, direct := range []bool{false, true} {
			_, err = Open(Config{Path: path, Direct: direct}, nil)
			if !errors.Is(err, ErrNotRaw) || !strings.Contains(err.Error(), fmt.Sprintf(advice, path, path+".raw")) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s: %v", f.Format, err)
			}
		}
		open(t, Config{Path: path, Raw: true})
	}
}

func TestQcow2(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("SKIPPED: needs qemu-img")
	}
	path := filepath.Join(t.TempDir(), "it's.qcow2")
	if out, err := exec.Command("qemu-img", "create", "-f", "qcow2", path, "1M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	_, err := Open(Config{Path: path}, nil)
	if !errors.Is(err, ErrNotRaw) {
		t.Fatal(err)
	}
	// The advice is a command whose words a shell takes for the two paths.
	_, advice, _ := strings.Cut(err.Error(), "convert it: govmm image import ")
	advice, _, _ = strings.Cut(advice, " (or ")
	words, err := exec.Command("sh", "-c", "printf '%s\\n' "+advice).Output()
	if err != nil || string(words) != path+"\n"+path+".raw\n" {
		t.Fatalf("%q: %q, %v", advice, words, err)
	}
	if _, err := disks.Import(context.Background(), path, path+".raw", disks.ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	if d := open(t, Config{Path: path + ".raw"}); d.Size() != 1<<20 {
		t.Fatalf("%d bytes", d.Size())
	}
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, n int) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, make([]byte, n), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, says := range map[string]string{
		filepath.Join(dir, "none"): "no such file",
		dir:                        "neither a file nor a block device",
		fifo:                       "neither a file nor a block device",
		"/dev/null":                "neither a file nor a block device",
		write("empty", 0):          "truncate -s 10G",
		write("odd", 1000):         "truncate -s %512",
	} {
		if _, err := Open(Config{Path: path}, nil); err == nil || !strings.Contains(err.Error(), says) || !strings.HasPrefix(err.Error(), "disk "+path) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestLock(t *testing.T) {
	path := newImage(t, 64<<10)
	rw, other := open(t, Config{Path: path}), open(t, Config{Path: path})
	ro, ro2 := open(t, Config{Path: path, ReadOnly: true}), open(t, Config{Path: path, ReadOnly: true})
	lock := func(d *Device, wanted error) {
		t.Helper()
		if err := d.Lock(); !errors.Is(err, wanted) || (err == nil) != (wanted == nil) {
			t.Fatalf("lock: %v, want %v", err, wanted)
		}
	}
	unlock := func(d *Device) {
		t.Helper()
		if err := d.Unlock(); err != nil {
			t.Fatal(err)
		}
	}
	lock(rw, nil)
	lock(rw, nil)
	lock(other, ErrInUse)
	lock(ro, ErrInUse)
	unlock(rw)
	unlock(rw)
	lock(ro, nil)
	lock(ro2, nil)
	lock(rw, ErrInUse)
	unlock(ro)
	lock(rw, ErrInUse)
	unlock(ro2)
	lock(other, nil)
	// The lock ends with the open file.
	third := open(t, Config{Path: path})
	lock(third, ErrInUse)
	if err := other.image.close(); err != nil {
		t.Fatal(err)
	}
	lock(third, nil)
	other.image = third.image // for the clean-up
	third.image, _ = openImage(Config{Path: path})
}

// QEMU does not start on a disk that is in use here.
func TestLockQEMU(t *testing.T) {
	if _, err := exec.LookPath("qemu-io"); err != nil {
		t.Skip("SKIPPED: needs qemu-io")
	}
	path := newImage(t, 64<<10)
	d := open(t, Config{Path: path})
	if err := d.Lock(); err != nil {
		t.Fatal(err)
	}
	write := func() error {
		out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 512", path).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	if err := write(); err == nil || !strings.Contains(err.Error(), "lock") {
		t.Fatalf("qemu-io: %v", err)
	}
	if err := d.Unlock(); err != nil {
		t.Fatal(err)
	}
	if err := write(); err != nil {
		t.Fatal(err)
	}
}

// Direct I/O of any place and length, from memory at any address, with blocks
// that are larger than what is written, changes what it should and no more.
func TestDirect(t *testing.T) {
	path := newImage(t, 4<<20)
	disk := content(t, path)
	im, err := openImage(Config{Path: path, Direct: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := im.close(); err != nil {
			t.Error(err)
		}
	}()
	t.Logf("alignment of offsets %d, of memory %d", im.offsetAlign, im.memAlign)
	mem := make([]byte, 8<<20)
	for _, align := range []int{im.offsetAlign, maxBlock} {
		im.offsetAlign, im.memAlign = align, max(im.memAlign, 512)
		rng := rand.New(rand.NewPCG(2, uint64(align)))
		s := new(scratch)
		for step := range 400 {
			sectors := 1 + rng.IntN(16)
			if step%50 == 0 {
				sectors = 2000 + rng.IntN(3000) // more than the bounce buffer
			}
			off := rng.IntN(len(disk)/512-sectors) * 512
			n := sectors * 512
			var bufs [][]byte
			for at, left := rng.IntN(4)*256, n; left > 0; {
				m := min(left, 256*(1+rng.IntN(8000)))
				bufs = append(bufs, mem[at:at+m])
				at, left = at+m+rng.IntN(2)*8, left-m
			}
			if rng.IntN(2) == 0 {
				for _, b := range bufs {
					for i := range b {
						b[i] = byte(rng.Uint32())
					}
				}
				if err := im.write(bufs, int64(off), rng.IntN(8) == 0, s); err != nil {
					t.Fatal(err)
				}
				copyFrom(disk[off:off+n], bufs, 0)
				continue
			}
			if err := im.read(bufs, int64(off), s); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(bytes.Join(bufs, nil), disk[off:off+n]) {
				t.Fatalf("step %d: %d bytes at %d read wrong", step, n, off)
			}
		}
		if !bytes.Equal(content(t, path), disk) {
			t.Fatalf("alignment %d: the file has other bytes", align)
		}
	}
}

// Storage that cannot make zeros by itself gets them written. A memfd punches
// holes, and cannot zero a range.
func TestZeroFallback(t *testing.T) {
	fd, err := unix.MemfdCreate("disk", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	disk := bytes.Repeat([]byte{7}, 5<<20)
	if _, err := unix.Pwrite(fd, disk, 0); err != nil {
		t.Fatal(err)
	}
	im, err := openImage(Config{Path: fmt.Sprintf("/proc/self/fd/%d", fd)})
	if err != nil {
		t.Fatal(err)
	}
	defer im.close()
	for _, unmap := range []bool{false, true} {
		off, n := 512*3, 3<<20
		if unmap {
			off += 4 << 20
			n = 1024
		}
		if err := im.zero(int64(off), int64(n), unmap, true, new(scratch)); err != nil {
			t.Fatal(err)
		}
		clear(disk[off : off+n])
		got := make([]byte, len(disk))
		if err := im.read([][]byte{got}, 0, new(scratch)); err != nil || !bytes.Equal(got, disk) {
			t.Fatalf("unmap %v: other bytes, %v", unmap, err)
		}
	}
}

// A block device: a loop device of blocks of 4096 bytes.
func TestBlockDevice(t *testing.T) {
	path := newImage(t, 4<<20)
	out, err := exec.Command("losetup", "--find", "--show", "--sector-size", "4096", path).CombinedOutput()
	if err != nil {
		t.Skipf("SKIPPED: needs root and loop devices: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	disk := content(t, path)
	for _, direct := range []bool{false, true} {
		d := open(t, Config{Path: dev, Direct: direct})
		if d.Size() != 4<<20 || d.topology.BlockSize != 4096 {
			t.Fatalf("%d bytes, %+v", d.Size(), d.topology)
		}
		if err := d.Lock(); err != nil {
			t.Fatal(err)
		}
		// Another node of the same device has locks of its own.
		var st unix.Stat_t
		if err := unix.Stat(dev, &st); err != nil {
			t.Fatal(err)
		}
		node := filepath.Join(t.TempDir(), "node")
		if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(st.Rdev)); err != nil {
			t.Fatal(err)
		}
		if err := open(t, Config{Path: node}).Lock(); !errors.Is(err, ErrInUse) {
			t.Fatalf("lock by another node: %v", err)
		}
		r := newRig(t, d, layouts["split"])
		copy(r.data(512), bytes.Repeat([]byte{0x55}, 512))
		status, _ := r.do(typeOut, 17, 512, false)
		want(t, "write of an eighth of a block", status, statusOK)
		copy(disk[17*512:], r.data(512))
		r.putRange(0, 1024, 64, 0)
		status, _ = r.do(typeWriteZeroes, 0, rangeSize, false)
		want(t, "write zeroes", status, statusOK)
		clear(disk[1024*512 : 1088*512])
		r.putRange(0, 2041, 100, 0)
		status, _ = r.do(typeDiscard, 0, rangeSize, false)
		want(t, "discard", status, statusOK)
		clear(disk[2048*512 : 2136*512]) // whole blocks, which loop makes zeros
		status, _ = r.do(typeFlush, 0, 0, false)
		want(t, "flush", status, statusOK)
		status, _ = r.do(typeIn, 16, 8192, true)
		want(t, "read", status, statusOK)
		if !bytes.Equal(r.data(8192), disk[16*512:16*512+8192]) {
			t.Fatal("read: other bytes")
		}
		if err := d.Unlock(); err != nil {
			t.Fatal(err)
		}
	}
	if err := exec.Command("blockdev", "--flushbufs", dev).Run(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(content(t, path), disk) {
		t.Fatal("the file below has other bytes")
	}
}
