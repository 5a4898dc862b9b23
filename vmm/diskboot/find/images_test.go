package find_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/vmm/diskboot/find"
)

// tree is the files of a file system. A text that begins with "-> " is a symbolic link.
type tree map[string]string

// blob is n bytes that no other blob has.
func blob(name string, n int) string {
	seed := sha256.Sum256([]byte(name))
	b := make([]byte, n)
	_, _ = rand.NewChaCha8(seed).Read(b)
	return string(b)
}

// write makes the files in a new directory.
func (f tree) write(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range f {
		at := filepath.Join(dir, name)
		err := os.MkdirAll(filepath.Dir(at), 0o755)
		if to, link := strings.CutPrefix(text, "-> "); err == nil && link {
			err = os.Symlink(to, at)
		} else if err == nil {
			err = os.WriteFile(at, []byte(text), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	testenv.NeedTools(t, name)
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "MTOOLS_SKIP_CHECK=1", "E2FSPROGS_FAKE_TIME=1700000000")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// maker makes a file system of files with so many MiB and returns its image.
type maker func(t *testing.T, f tree, mib int) string

func ext(kind string, options ...string) maker {
	return func(t *testing.T, f tree, mib int) string {
		t.Helper()
		image := filepath.Join(t.TempDir(), "fs.img")
		command(t, "mke2fs", append(append([]string{"-q", "-F", "-t", kind, "-d", f.write(t)}, options...), image, fmt.Sprintf("%dM", mib))...)
		return image
	}
}

func vfat(options ...string) maker {
	return func(t *testing.T, f tree, mib int) string {
		t.Helper()
		image := filepath.Join(t.TempDir(), "fs.img")
		blank(t, image, int64(mib)<<20)
		command(t, "mkfs.vfat", append(options, image)...)
		dir := f.write(t)
		names, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		args := []string{"-s", "-i", image}
		for _, n := range names {
			args = append(args, filepath.Join(dir, n.Name()))
		}
		command(t, "mcopy", append(args, "::")...)
		return image
	}
}

func squash(options ...string) maker {
	return func(t *testing.T, f tree, _ int) string {
		t.Helper()
		image := filepath.Join(t.TempDir(), "fs.img")
		command(t, "mksquashfs", append([]string{f.write(t), image, "-noappend", "-quiet", "-no-progress"}, options...)...)
		return image
	}
}

func blank(t *testing.T, path string, size int64) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
}

// part is a partition with a file system.
type part struct {
	image  string
	script string // sfdisk's words for it
}

// disk puts partitions on a disk, with sfdisk's script before them; it leaves out those
// without an image. The partitions are at 1 MiB, 101 MiB…, 99 MiB long.
func disk(t *testing.T, head string, parts ...part) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "disk.img")
	blank(t, image, int64(len(parts)*100+10)<<20)
	script := head + "\n"
	for i, p := range parts {
		size := 99
		if strings.Contains(p.script, "type=5") {
			size = 100*(len(parts)-i) - 1
		}
		script += fmt.Sprintf("start=%dMiB, size=%dMiB, %s\n", 100*i+1, size, p.script)
	}
	testenv.NeedTools(t, "sfdisk")
	cmd := exec.Command("sfdisk", "-q", image)
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v\n%s\n%s", err, out, script)
	}
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i, p := range parts {
		if p.image == "" {
			continue
		}
		b, err := os.ReadFile(p.image)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(b, int64(100*i+1)<<20); err != nil {
			t.Fatal(err)
		}
	}
	return image
}

// look returns the entries of an image.
func look(t *testing.T, image string) ([]*find.Entry, error) {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return find.Disk(f, st.Size())
}

// expected is what an image boots.
type expected struct {
	id, title       string
	kernel, initrd  string // content
	cmdline, source string
}

// boots checks what an image boots, or its entry of this name.
func boots(t *testing.T, image, entry string, want expected) {
	t.Helper()
	entries, err := look(t, image)
	if err != nil {
		t.Fatal(err)
	}
	e, err := find.Choose(entries, entry)
	if err != nil {
		t.Fatal(err)
	}
	i, err := e.Image()
	if err != nil {
		t.Fatal(err)
	}
	if want.id != "" && e.ID != want.id {
		t.Errorf("id: expected %q, found %q", want.id, e.ID)
	}
	if want.title != "" && e.Title != want.title {
		t.Errorf("title: expected %q, found %q", want.title, e.Title)
	}
	if want.source != "" && e.Source != want.source {
		t.Errorf("source: expected %q, found %q", want.source, e.Source)
	}
	if i.Cmdline != want.cmdline {
		t.Errorf("command line: expected %q, found %q", want.cmdline, i.Cmdline)
	}
	same(t, "kernel", &i.Kernel, want.kernel)
	same(t, "initrd", &i.Initrd, want.initrd)
}

func same(t *testing.T, what string, s *find.Stream, want string) {
	t.Helper()
	var b bytes.Buffer
	if n, err := s.WriteTo(&b); err != nil || n != s.Size {
		t.Errorf("%s: %d of %d bytes: %v", what, n, s.Size, err)
	}
	got := b.Bytes()
	if !bytes.Equal(got, []byte(want)) {
		at := 0
		for at < len(got) && at < len(want) && got[at] == want[at] {
			at++
		}
		t.Errorf("%s: %d bytes, expected %d; they differ from %d on", what, len(got), len(want), at)
	}
}

// uki makes a unified kernel image as ukify and objcopy do: an EFI program with sections.
func uki(sections ...string) string {
	const headers, align = 0x400, 0x200
	le := binary.LittleEndian
	n := len(sections) / 2
	b := make([]byte, headers)
	copy(b, "MZ")
	le.PutUint32(b[0x3c:], 0x80)
	copy(b[0x80:], "PE\x00\x00")
	le.PutUint16(b[0x84:], 0x8664)
	le.PutUint16(b[0x86:], uint16(n))
	le.PutUint16(b[0x94:], 0xf0) // of the optional header
	at := 0x80 + 24 + 0xf0
	for i := range n {
		name, data := sections[2*i], sections[2*i+1]
		h := b[at+40*i:]
		copy(h[:8], name)
		le.PutUint32(h[8:], uint32(len(data)))
		padded := (len(data) + align - 1) / align * align
		le.PutUint32(h[16:], uint32(padded))
		le.PutUint32(h[20:], uint32(len(b)))
		b = append(b, data...)
		b = append(b, make([]byte, padded-len(data))...)
	}
	return string(b)
}
