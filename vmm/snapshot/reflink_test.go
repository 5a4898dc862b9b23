package snapshot

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
)

// Where the file system has clones an image is cloned: nothing is copied, and what is
// written to it afterwards does not reach the clone. A disk of another file system is
// copied.
func TestReflink(t *testing.T) {
	testenv.NeedRoot(t, "a file system is mounted")
	testenv.NeedTools(t, "mkfs.btrfs", "mount", "umount")
	dir := t.TempDir()
	device, at := filepath.Join(dir, "fs.img"), filepath.Join(dir, "fs")
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(device)
	if err == nil {
		err = f.Truncate(256 << 20)
	}
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	run("mkfs.btrfs", "-q", device)
	run("mount", "-o", "loop", device, at)
	t.Cleanup(func() { run("umount", at) })

	image, was := filepath.Join(at, "a.img"), bytes.Repeat([]byte("as it was"), 64<<10)
	was = was[:len(was)&^4095]
	if err := os.WriteFile(image, was, 0o600); err != nil {
		t.Fatal(err)
	}
	if !Clones(filepath.Join(at, "one"), []string{image}) || Clones(filepath.Join(dir, "one"), []string{image}) {
		t.Error("clones are possible within the file system, and only there")
	}
	for _, c := range []struct {
		to   string
		how  Disks
		want Disks
	}{
		{filepath.Join(at, "clone"), DisksReflink, DisksReflink},
		{filepath.Join(at, "copy"), DisksCopy, DisksCopy},
		{filepath.Join(dir, "elsewhere"), DisksReflink, DisksCopy},
	} {
		if err := os.WriteFile(image, was, 0o600); err != nil {
			t.Fatal(err)
		}
		var done atomic.Uint64
		how, err := keepImage(t.Context(), image, c.to, int64(len(was)), c.how, &done)
		if err != nil || how != c.want {
			t.Errorf("%s: %s, %v; expected %s", c.to, how, err, c.want)
		}
		if copied := how == DisksCopy; copied != (done.Load() == uint64(len(was))) {
			t.Errorf("%s: %d bytes of %d are counted", c.to, done.Load(), len(was))
		}
		if err := os.WriteFile(image, bytes.Repeat([]byte{1}, len(was)), 0o600); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(c.to); err != nil || !bytes.Equal(b, was) {
			t.Errorf("%s differs: %v", c.to, err)
		}
		if _, err := keepImage(t.Context(), image, c.to, int64(len(was)), c.how, new(atomic.Uint64)); err == nil {
			t.Errorf("%s was overwritten", c.to)
		}
	}
	if _, err := keepImage(t.Context(), image, filepath.Join(at, "short"), int64(len(was))-512, DisksReflink, new(atomic.Uint64)); err == nil {
		t.Error("an image of another size was kept")
	}
	for _, bad := range []string{at, "/dev/zero", filepath.Join(at, "nowhere")} {
		if _, err := keepImage(t.Context(), bad, filepath.Join(at, "bad"), 512, DisksReflink, new(atomic.Uint64)); err == nil {
			t.Errorf("%s was kept", bad)
		}
	}
}
