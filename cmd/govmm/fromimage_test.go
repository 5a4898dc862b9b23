package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// An image is imported once, under the VM's name, and another one is not taken for it.
func TestRunFromAnImage(t *testing.T) {
	data := t.TempDir()
	t.Setenv("XDG_DATA_HOME", data)
	from := filepath.Join(t.TempDir(), "a.raw")
	if err := os.WriteFile(from, append([]byte("content"), make([]byte, 1<<20-7)...), 0o600); err != nil {
		t.Fatal(err)
	}
	take := func(name, path string) (disk string, err error) {
		f := imageFlags{image: path, size: 2 << 20}
		spec, err := f.device(name)
		if err != nil {
			return "", err
		}
		cmd := newRun()
		cmd.SetContext(t.Context())
		return spec.Path, f.make(cmd)
	}
	disk, err := take("web", from)
	if err != nil || disk != filepath.Join(data, "govmm", "web.raw") {
		t.Fatalf("%s, %v", disk, err)
	}
	b, err := os.ReadFile(disk)
	if err != nil || len(b) != 2<<20 || !strings.HasPrefix(string(b), "content") {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	if err := os.WriteFile(disk, []byte("the guest's"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := take("web", from); err == nil || !strings.Contains(err.Error(), "web.raw is there, and has 11 B: truncate -s 2097152 "+disk+" makes it larger") {
		t.Errorf("it is to be larger: %v", err)
	}
	if err := os.Truncate(disk, 3<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := take("web", from); err != nil {
		t.Errorf("the second time: %v", err)
	}
	if b, err := os.ReadFile(disk); err != nil || len(b) != 3<<20 || !strings.HasPrefix(string(b), "the guest's") {
		t.Errorf("the disk was made again: %d bytes, %v", len(b), err)
	}
	other := filepath.Join(t.TempDir(), "b.raw")
	if _, err := take("web", other); err == nil || !strings.Contains(err.Error(), "was made of "+from) {
		t.Errorf("another image: %v", err)
	}
	if _, err := take("new", other); err == nil {
		t.Error("an image that is not there")
	}
	if list, err := filepath.Glob(filepath.Join(data, "govmm", "new*")); err != nil || len(list) > 0 {
		t.Errorf("left: %q, %v", list, err)
	}
	if _, err := take("", from); err == nil || !strings.Contains(err.Error(), "needs a NAME") {
		t.Errorf("without a name: %v", err)
	}
}
