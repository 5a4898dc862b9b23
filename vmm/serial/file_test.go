package serial

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func fileBackend(t *testing.T, words string) *file {
	t.Helper()
	b, err := openFile(words)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(b)
}

// Two processes write to one file, as both ends of a migration may: it never exceeds its
// size, one older file is kept, and no line is lost that is not older than both.
func TestFileRotates(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a,b.log")
	words := strings.ReplaceAll(path, ",", ",,") + ",max=8K"
	a, b := fileBackend(t, words), fileBackend(t, words)
	line := func(i int) string { return fmt.Sprintf("%0*d\n", 1023, i) }
	for i := range 64 {
		write(t, []*file{a, b}[i/3%2], line(i))
		now, older := read(t, path), read(t, path+".1")
		if len(now) > 8<<10 || len(older) > 8<<10 {
			t.Fatalf("%d and %d bytes", len(now), len(older))
		}
		all, want := older+now, ""
		for j := max(0, i+1-len(all)/1024); j <= i; j++ {
			want += line(j)
		}
		if all != want || i >= 16 && len(all) <= 8<<10 {
			t.Fatalf("after line %d: %d bytes, not the last lines", i, len(all))
		}
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
}

// A file that somebody else has renamed or removed is made anew.
func TestFileIsRemoved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	b := fileBackend(t, path)
	write(t, b, "one")
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	write(t, b, "two")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	write(t, b, "three")
	if old, now := read(t, path+".old"), read(t, path); old != "one" || now != "three" {
		t.Errorf("%q, %q", old, now)
	}
}

// What is no regular file is not rotated.
func TestDeviceIsNotRotated(t *testing.T) {
	b := fileBackend(t, "/dev/null,max=4K")
	for range 3 {
		write(t, b, strings.Repeat("x", 4096))
	}
}

// A disk that is full loses output, and takes it again when there is room: also for a
// file that had to be rotated meanwhile.
func TestFileOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=64k", "none", dir).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: needs root: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	path := filepath.Join(dir, "log")
	b := fileBackend(t, path+",max=16K")
	if err := os.WriteFile(filepath.Join(dir, "other"), bytes.Repeat([]byte("x"), 52<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	for range 16 {
		if _, err = b.Write(bytes.Repeat([]byte("y"), 4096)); err != nil {
			break
		}
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("written to a full disk: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "other")); err != nil {
		t.Fatal(err)
	}
	for range 16 {
		write(t, b, strings.Repeat("z", 4096))
	}
	if got := read(t, path); got == "" || strings.Trim(got, "z") != "" {
		t.Errorf("%d bytes, %.10q", len(got), got)
	}
}

func TestParseFile(t *testing.T) {
	for words, want := range map[string]int64{
		"/a": defaultMax, "/a,max=off": 0, "/a,max=4096": 4096, "/a,max=4K": 4096, "/a,max=3M": 3 << 20, "/a,max=2G": 2 << 30, "/a,max=1T": 1 << 40,
	} {
		if b, err := parseFile(words); err != nil || b.path != "/a" || b.most != want {
			t.Errorf("%q: %+v, %v", words, b, err)
		}
	}
	for _, words := range []string{"", ",max=4K", "/a,max=", "/a,max=4095", "/a,max=-4K", "/a,max=1X", "/a,max=9999999T", "/a,max=K", "/a,size=4K", "/a,b"} {
		if b, err := parseFile(words); err == nil {
			t.Errorf("%q: %+v", words, b)
		}
		if err := CheckBackend("file:" + words); err == nil {
			t.Errorf("%q was taken", words)
		}
	}
}
