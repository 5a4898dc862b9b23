package diskboot_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/vmm/diskboot"
	"github.com/govmm/govmm/vmm/diskboot/find"
	"golang.org/x/sys/unix"
)

// TestMain is the reader too, and processes that do not keep to its rules.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 {
		switch os.Args[1] {
		case "__read-disk":
			if find.Serve() != nil {
				os.Exit(1)
			}
			os.Exit(0)
		case "__liar":
			lie(os.NewFile(3, "the VM's process"))
		case "__glutton": // within the bounds of the reader
			if find.Enter() != nil {
				os.Exit(9)
			}
			for n := 1 << 20; ; n *= 2 {
				kept = append(kept, bytes.Repeat([]byte{1}, n)...)
			}
		case "__open", "__socket", "__exec", "__kill":
			escape(os.Args[1])
		case "__silent":
			time.Sleep(time.Hour)
		}
	}
	testenv.Main(m)
}

// kept is what a process keeps.
var kept []byte

// survived is the exit status of a process that did what it must not.
const survived = 77

// escape tries, in the reader's cage, what its argument says.
func escape(how string) {
	if find.Enter() != nil {
		os.Exit(9)
	}
	var err error
	switch how {
	case "__open":
		_, err = unix.Open("/etc/passwd", unix.O_RDONLY, 0)
	case "__socket":
		_, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	case "__exec":
		err = unix.Exec("/bin/true", []string{"true"}, nil)
	case "__kill":
		err = unix.Kill(os.Getppid(), 0)
	}
	_ = err
	os.Exit(survived)
}

// TestCage: the reader ends when it does what no reader does.
func TestCage(t *testing.T) {
	for _, how := range []string{"__open", "__socket", "__exec", "__kill"} {
		cmd := exec.Command("/proc/self/exe", how)
		out, err := cmd.CombinedOutput()
		if err == nil || cmd.ProcessState.ExitCode() == survived || cmd.ProcessState.ExitCode() == 9 || !strings.Contains(string(out), "is not allowed here") {
			t.Errorf("%s: %v, %s", how, err, out)
		}
	}
}

// file is a disk.
type file struct {
	*os.File
	size int64
}

func (f file) Size() int64 { return f.size }

func open(t *testing.T, path string) file {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return file{f, st.Size()}
}

func start(t *testing.T, how string) *diskboot.Reader {
	t.Helper()
	r, err := diskboot.Start([]string{"/proc/self/exe", how})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// image makes a disk with a kernel.
func image(t *testing.T, kernel, initrd []byte) string {
	t.Helper()
	testenv.NeedTools(t, "mke2fs")
	dir, path := t.TempDir(), filepath.Join(t.TempDir(), "disk.img")
	for name, b := range map[string][]byte{"vmlinuz-6.1": kernel, "initrd.img-6.1": initrd} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("mke2fs", "-q", "-F", "-t", "ext4", "-d", dir, path, "128M").CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v\n%s", err, out)
	}
	return path
}

func TestReader(t *testing.T) {
	kernel, initrd := bytes.Repeat([]byte("kernel "), 1<<20), bytes.Repeat([]byte("initrd  "), 4<<20)
	d := open(t, image(t, kernel, initrd))
	r := start(t, "__read-disk")
	for range 3 {
		began := time.Now()
		i, err := r.Read(context.Background(), d, "")
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%d bytes in %v", len(i.Kernel)+len(i.Initrd), time.Since(began))
		if !bytes.Equal(i.Kernel, kernel) || !bytes.Equal(i.Initrd, initrd) {
			t.Error("the kernel or its initial RAM disk is not what is on the disk")
		}
		if want := (diskboot.Entry{ID: "vmlinuz-6.1", Title: "Linux 6.1", Source: "the disk without partitions: /vmlinuz-6.1", Kernel: "/vmlinuz-6.1",
			Initrds: []string{"/initrd.img-6.1"}, Cmdline: "console=ttyS0"}); i.Entry.Title != want.Title || i.Entry.Source != want.Source || i.Entry.Cmdline != want.Cmdline {
			t.Errorf("expected %+v, found %+v", want, i.Entry)
		}
	}
	if _, err := r.Read(context.Background(), d, "other"); err == nil || !strings.Contains(err.Error(), `no entry "other": expected one of "vmlinuz-6.1"`) {
		t.Errorf("an entry that is not there: %v", err)
	}
	list, err := r.List(context.Background(), d)
	if err != nil || len(list) != 1 || list[0].ID != "vmlinuz-6.1" {
		t.Errorf("list: %+v, %v", list, err)
	}
	if _, err := r.Read(context.Background(), blankDisk(1<<20), ""); !errors.Is(err, diskboot.ErrNoKernel) || !strings.HasPrefix(err.Error(), "no kernel: neither") {
		t.Errorf("a blank disk: %v", err)
	}
	if _, err := r.Read(context.Background(), brokenDisk{}, ""); err == nil || !strings.Contains(err.Error(), "the host's storage is broken") {
		t.Errorf("a disk that cannot be read: %v", err)
	}
}

// blankDisk has zeros.
type blankDisk int64

func (b blankDisk) Size() int64 { return int64(b) }
func (b blankDisk) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

type brokenDisk struct{}

func (brokenDisk) Size() int64 { return 1 << 20 }
func (brokenDisk) ReadAt([]byte, int64) (int, error) {
	return 0, errors.New("the host's storage is broken")
}

func TestBadReaders(t *testing.T) {
	d := blankDisk(1 << 20)
	for lie, want := range lies {
		r := start(t, "__liar")
		_, err := r.Read(context.Background(), d, lie)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: expected %q, found %v", lie, want, err)
		}
		if _, err := r.Read(context.Background(), d, lie); err == nil && lie != "an escape" {
			t.Errorf("%s: the reader is asked again", lie)
		}
	}
	r := start(t, "__silent")
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := r.Read(ctx, d, ""); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a reader that does not answer: %v", err)
	}
}

// TestNoReaderStartsReaders: a program that does not know that it was started as a reader starts no other.
func TestNoReaderStartsReaders(t *testing.T) {
	t.Setenv("GOVMM_READS_DISK", "1")
	if _, err := diskboot.Start([]string{"/proc/self/exe", "__read-disk"}); err == nil {
		t.Error("a reader was started by a reader")
	}
}

func TestLooks(t *testing.T) {
	for mark, at := range map[string]int64{"\x55\xaa": 510, "EFI PART": 512, "hsqs": 0, "\x53\xef": 1080, "CD001": 0x8001} {
		b := make([]byte, 128<<10)
		if diskboot.Looks(bytes.NewReader(b)) {
			t.Fatal("a blank disk looks as if it had a system")
		}
		copy(b[at:], mark)
		if !diskboot.Looks(bytes.NewReader(b)) {
			t.Errorf("%q at %d is not recognised", mark, at)
		}
	}
}

// TestBounds: a disk on which everything is endless ends the search, and says so.
func TestBounds(t *testing.T) {
	r := start(t, "__read-disk")
	if _, err := r.Read(context.Background(), loops{}, ""); err == nil || len(err.Error()) > 8<<10 {
		t.Errorf("%v", err)
	}
	if raced { // its shadow memory counts too, so that there is no limit
		return
	}
	// A process that wants more memory than it may have ends.
	r = start(t, "__glutton")
	if _, err := r.Read(context.Background(), blankDisk(1<<20), ""); err == nil || !strings.Contains(err.Error(), "has ended") {
		t.Errorf("a reader that needs all memory: %v", err)
	}
}

// loops is a disk of 1 TiB each of whose sectors is an extended partition table that leads to the next.
type loops struct{}

func (loops) Size() int64 { return 1 << 40 }
func (loops) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		switch (off + int64(i)) % 512 {
		case 446 + 4:
			p[i] = 0x83
		case 446 + 8, 446 + 12, 462 + 8, 462 + 12:
			p[i] = 1
		case 462 + 4:
			p[i] = 5
		case 510:
			p[i] = 0x55
		case 511:
			p[i] = 0xaa
		default:
			p[i] = 0
		}
	}
	return len(p), nil
}
