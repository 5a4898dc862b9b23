package image

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
	"golang.org/x/sys/unix"
)

// compress makes name + ending of a file.
func compress(t *testing.T, path, program, ending string) string {
	t.Helper()
	out, err := os.Create(path + ending)
	testenv.Check(t, err)
	defer out.Close()
	cmd := exec.Command(program, "-c", path)
	cmd.Stdout = out
	testenv.Check(t, cmd.Run())
	return path + ending
}

// imports imports an image and compares the disk.
func imports(t *testing.T, from string, o ImportOptions, want []byte) Imported {
	t.Helper()
	to := filepath.Join(t.TempDir(), "disk.raw")
	done, err := Import(context.Background(), from, to, o)
	testenv.Check(t, err)
	got, err := os.ReadFile(to)
	testenv.Check(t, err)
	if len(got) != len(want) || done.Size != int64(len(want)) {
		t.Fatalf("%d bytes, said to be %d; want %d", len(got), done.Size, len(want))
	}
	differs(t, "the new disk", 0, got, want)
	st, err := os.Stat(to)
	testenv.Check(t, err)
	if st.Mode() != 0o600 {
		t.Errorf("the new disk's mode is %v", st.Mode())
	}
	alone(t, to)
	return done
}

// alone fails if there is another file in the directory than those of the paths.
func alone(t *testing.T, paths ...string) {
	t.Helper()
	files, err := os.ReadDir(filepath.Dir(paths[0]))
	testenv.Check(t, err)
	for _, f := range files {
		found := false
		for _, p := range paths {
			found = found || filepath.Base(p) == f.Name()
		}
		if !found {
			t.Errorf("%s is left", f.Name())
		}
	}
}

// sparse is a disk of some MiB with holes of all sizes.
func sparse() []byte {
	b := make([]byte, 20<<20+512)
	copy(b[5<<20:], content(5, 3<<20))
	copy(b[len(b)-700:], "the end")
	return b
}

// What each kind of image holds becomes a disk, with holes.
func TestImport(t *testing.T) {
	testenv.NeedTools(t, "qemu-img", "gzip", "xz", "zstd")
	dir := t.TempDir()
	want := sparse()
	raw, qcow := filepath.Join(dir, "a.img"), filepath.Join(dir, "b.img")
	testenv.Check(t, os.WriteFile(raw, want, 0o600))
	tool(t, dir, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, qcow)
	for from, kind := range map[string]string{
		raw:                              "raw",
		qcow:                             "qcow2",
		compress(t, raw, "gzip", ".gz"):  "raw in gzip",
		compress(t, raw, "xz", ".xz"):    "raw in xz",
		compress(t, raw, "zstd", ".zst"): "raw in zstd",
		compress(t, qcow, "gzip", ".gz"): "qcow2 in gzip",
		compress(t, qcow, "xz", ".xz"):   "qcow2 in xz",
		compress(t, qcow, "zstd", ".a"):  "qcow2 in zstd",
	} {
		t.Run(kind, func(t *testing.T) {
			var last Progress
			done := imports(t, from, ImportOptions{Progress: func(p Progress) { last = p }}, want)
			if done.Kind.String() != kind || last.Done > last.Total {
				t.Errorf("it is %v; progress %+v", done.Kind, last)
			}
			if done.Written > 4<<20 {
				t.Errorf("%d bytes were written", done.Written)
			}
			imports(t, from, ImportOptions{Size: 30<<20 + 1}, append(bytes.Clone(want), make([]byte, 30<<20+512-len(want))...))
		})
	}
}

// A disk whose size is no multiple of a sector gets zeros.
func TestImportOddSize(t *testing.T) {
	from := filepath.Join(t.TempDir(), "a.raw")
	testenv.Check(t, os.WriteFile(from, []byte("abc"), 0o600))
	imports(t, from, ImportOptions{}, append([]byte("abc"), make([]byte, 509)...))
	imports(t, compress(t, from, "gzip", ".gz"), ImportOptions{}, append([]byte("abc"), make([]byte, 509)...))
}

// What cannot be imported is refused in a line, and leaves nothing.
func TestImportRefuses(t *testing.T) {
	testenv.NeedTools(t, "qemu-img", "gzip")
	dir := t.TempDir()
	file := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		testenv.Check(t, os.WriteFile(path, b, 0o600))
		return path
	}
	raw := file("a.img", content(1, 1<<20))
	qcow := filepath.Join(dir, "b.img")
	tool(t, dir, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow)
	whole, err := os.ReadFile(qcow)
	testenv.Check(t, err)
	backed := filepath.Join(dir, "backed.img")
	tool(t, dir, "qemu-img", "create", "-f", "qcow2", "-b", "a.img", "-F", "raw", backed)
	packed, err := os.ReadFile(compress(t, raw, "gzip", ".gz"))
	testenv.Check(t, err)
	testenv.Check(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	there := filepath.Join(t.TempDir(), "there.raw")
	testenv.Check(t, os.WriteFile(there, []byte("mine"), 0o600))
	for _, c := range []struct {
		what, from, to string
		o              ImportOptions
		want           string
	}{
		{"no file", filepath.Join(dir, "none"), "", ImportOptions{}, "no such file"},
		{"a directory", dir, "", ImportOptions{}, "neither a file nor a block device"},
		{"a FIFO", filepath.Join(dir, "fifo"), "", ImportOptions{}, "neither a file nor a block device"},
		{"an empty file", file("empty", nil), "", ImportOptions{}, "the disk is empty"},
		{"a smaller size", qcow, "", ImportOptions{Size: 1<<20 - 1024}, "1047552 bytes (1023 KiB): the image's disk has 1048576 (1.00 MiB), and is not made smaller"},
		{"an enormous size", qcow, "", ImportOptions{Size: 1 << 63}, "expected at most"},
		{"a cut image", file("cut.img", whole[:len(whole)-300<<10]), "", ImportOptions{}, "is the file whole"},
		{"a cut stream", file("cut.gz", packed[:len(packed)/2]), "", ImportOptions{}, "unexpected EOF"},
		{"a damaged stream", file("damaged.gz", append(bytes.Clone(packed[:len(packed)-5]), "12345"...)), "", ImportOptions{}, "invalid"},
		{"another format", file("a.vmdk", append([]byte("KDMV"), make([]byte, 1<<20)...)), "", ImportOptions{}, "its format is vmdk"},
		{"raw that is called qcow2", file("c.qcow2", content(1, 1<<20)), "", ImportOptions{}, "to begin with"},
		{"a guess with a backing file", backed, "", ImportOptions{}, "say --format qcow2"},
		{"a compressed image with a backing file", compress(t, backed, "gzip", ".gz"), "", ImportOptions{}, "it has a backing file"},
		{"a file that is there", qcow, there, ImportOptions{}, "without --force"},
		{"the same file", qcow, qcow, ImportOptions{Force: true}, "the same file"},
		{"no directory", qcow, filepath.Join(dir, "none", "a.raw"), ImportOptions{}, "make a file in " + filepath.Join(dir, "none") + ": no such file"},
		{"a directory as the disk", qcow, dir, ImportOptions{Force: true}, "what is no file"},
		{"an unknown format", qcow, "", ImportOptions{Format: "vhd"}, "expected raw or qcow2"},
	} {
		to := c.to
		if to == "" {
			to = filepath.Join(t.TempDir(), "disk.raw")
		}
		_, err := Import(context.Background(), c.from, to, c.o)
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v; want one with %q", c.what, err, c.want)
		}
		if c.to == "" {
			if files, err := os.ReadDir(filepath.Dir(to)); err != nil || len(files) > 0 {
				t.Errorf("%s: %v, %v is left", c.what, err, files)
			}
		}
	}
	if b, err := os.ReadFile(there); err != nil || string(b) != "mine" {
		t.Errorf("the file that was there: %q, %v", b, err)
	}
	alone(t, there)
	// With a word of its owner both are done.
	imports(t, backed, ImportOptions{Format: QCOW2}, content(1, 1<<20))
	_, err = Import(context.Background(), qcow, there, ImportOptions{Force: true})
	testenv.Check(t, err)
	if b, err := os.ReadFile(there); err != nil || !bytes.Equal(b, content(1, 1<<20)) {
		t.Errorf("the disk that was replaced: %d bytes, %v", len(b), err)
	}
	alone(t, there)
}

// A raw disk stays raw, whatever its guest writes into its first sectors: by its name, or
// since its owner says so.
func TestGuestCannotChangeTheFormat(t *testing.T) {
	testenv.NeedTools(t, "qemu-img")
	dir := t.TempDir()
	testenv.Check(t, os.WriteFile(filepath.Join(dir, "secret.raw"), []byte("another guest's"), 0o600))
	header := filepath.Join(dir, "header")
	tool(t, dir, "qemu-img", "create", "-f", "qcow2", "-b", "secret.raw", "-F", "raw", header)
	written, err := os.ReadFile(header)
	testenv.Check(t, err)
	for _, guest := range [][]byte{written, append([]byte("\x1f\x8b\x08"), make([]byte, 8<<10-3)...), append([]byte("KDMV"), make([]byte, 8<<10-4)...)} {
		disk := filepath.Join(dir, "disk.raw")
		guest = append(guest, make([]byte, -len(guest)&511)...)
		testenv.Check(t, os.WriteFile(disk, guest, 0o600))
		imports(t, disk, ImportOptions{}, guest)
		other := filepath.Join(dir, "disk.img")
		testenv.Check(t, os.Rename(disk, other))
		imports(t, other, ImportOptions{Format: Raw}, guest)
	}
}

// An import that is interrupted leaves nothing.
func TestImportInterrupted(t *testing.T) {
	testenv.NeedTools(t, "gzip")
	dir := t.TempDir()
	raw := filepath.Join(dir, "a.img")
	testenv.Check(t, os.WriteFile(raw, content(9, 40<<20), 0o600))
	why := errors.New("interrupted")
	for _, from := range []string{raw, compress(t, raw, "gzip", ".gz")} {
		ctx, cancel := context.WithCancelCause(context.Background())
		cancel(why)
		to := filepath.Join(t.TempDir(), "disk.raw")
		if _, err := Import(ctx, from, to, ImportOptions{}); !errors.Is(err, why) {
			t.Errorf("%s: %v", from, err)
		}
		if files, _ := os.ReadDir(filepath.Dir(to)); len(files) > 0 {
			t.Errorf("%v is left", files)
		}
	}
}

// A disk that is in use is not imported.
func TestImportInUse(t *testing.T) {
	from := filepath.Join(t.TempDir(), "a.raw")
	testenv.Check(t, os.WriteFile(from, content(1, 1<<20), 0o600))
	f, err := os.OpenFile(from, os.O_RDWR, 0)
	testenv.Check(t, err)
	defer f.Close()
	testenv.Check(t, unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}))
	if _, err := Import(context.Background(), from, filepath.Join(t.TempDir(), "b.raw"), ImportOptions{}); !errors.Is(err, ErrInUse) {
		t.Error(err)
	}
}

// Where a file system has no files without a name, the temporary name is removed.
func TestNamedTarget(t *testing.T) {
	dir := t.TempDir()
	make := func() *target {
		out := &target{path: filepath.Join(dir, "disk.raw")}
		out.temp = out.tempName()
		var err error
		out.File, err = os.Create(out.temp)
		testenv.Check(t, err)
		return out
	}
	make().abandon()
	if files, _ := os.ReadDir(dir); len(files) > 0 {
		t.Errorf("%v is left", files)
	}
	out := make()
	testenv.Check(t, out.commit())
	out.abandon()
	alone(t, filepath.Join(dir, "disk.raw"))
	out = make()
	if err := out.commit(); !errors.Is(err, unix.EEXIST) {
		t.Error(err)
	}
	out.abandon()
	alone(t, filepath.Join(dir, "disk.raw"))
}

// Backing files are plain names beside the image, files, and not below themselves.
func TestChainRules(t *testing.T) {
	testenv.NeedTools(t, "qemu-img")
	dir := t.TempDir()
	outside := filepath.Join(t.TempDir(), "outside.raw")
	testenv.Check(t, os.WriteFile(outside, content(1, 1<<20), 0o600))
	testenv.Check(t, os.WriteFile(filepath.Join(dir, "beside.raw"), content(1, 1<<20), 0o600))
	testenv.Check(t, os.Symlink(outside, filepath.Join(dir, "link.raw")))
	testenv.Check(t, os.Mkdir(filepath.Join(dir, "directory"), 0o700))
	testenv.Check(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	for i, c := range []struct{ backing, format, want string }{
		{"beside.raw", "raw", ""},
		{outside, "raw", "plain name"},
		{"../" + filepath.Base(filepath.Dir(outside)) + "/outside.raw", "raw", "plain name"},
		{"./beside.raw", "raw", "plain name"},
		{"..", "raw", "plain name"},
		{"json:{}", "raw", "no such file"},
		{"nbd://127.0.0.1", "raw", "plain name"},
		{"link.raw", "raw", "found a symbolic link"},
		{"directory", "raw", "neither a file"},
		{"fifo", "raw", "neither a file"},
		{"missing", "raw", "no such file"},
		{"beside.raw", "", "does not say its format"},
		{"beside.raw", "vmdk", "expected raw or qcow2"},
		{"beside.raw", "qcow2", "to begin with"},
		{"itself.qcow2", "qcow2", "below itself"},
	} {
		path := filepath.Join(dir, fmt.Sprintf("top%d.qcow2", i))
		if c.backing == "itself.qcow2" {
			path = filepath.Join(dir, c.backing)
		}
		tool(t, dir, "qemu-img", "create", "-u", "-f", "qcow2", "-b", c.backing, "-F", cmp.Or(c.format, "raw"), path, "1M")
		if c.format == "" { // which qemu-img does not leave out
			b, err := os.ReadFile(path)
			testenv.Check(t, err)
			testenv.Check(t, os.WriteFile(path, bytes.Replace(b, []byte("\xe2\x79\x2a\xca"), []byte("\x12\x34\x56\x78"), 1), 0o600))
		}
		r, err := Open(path, QCOW2)
		if err == nil {
			testenv.Check(t, r.Close())
		}
		if (err == nil) != (c.want == "") || err != nil && (!strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%s as %s: %v; want one with %q", c.backing, c.format, err, c.want)
		}
	}
	var below []string
	for i := range maxChain + 1 {
		path := filepath.Join(dir, fmt.Sprintf("deep%d.qcow2", i))
		args := append([]string{"create", "-u", "-f", "qcow2"}, below...)
		tool(t, dir, "qemu-img", append(args, path, "1M")...)
		below = []string{"-b", filepath.Base(path), "-F", "qcow2"}
		r, err := Open(path, QCOW2)
		if err == nil {
			testenv.Check(t, r.Close())
		}
		if (err == nil) != (i < maxChain) || err != nil && !strings.Contains(err.Error(), "more than 16 files") {
			t.Errorf("%d files: %v", i+1, err)
		}
	}
}

// Large runs of data pass by the page cache where the file system can do that, small ones
// do not, and data begins and ends anywhere.
func TestImportUnaligned(t *testing.T) {
	testenv.NeedTools(t, "qemu-img")
	dir := t.TempDir()
	want := make([]byte, 9<<20+512)
	noise := content(11, 3<<20)
	for i := range noise {
		noise[i] |= 1 // no zeros
	}
	copy(want[5*512:], noise[:700<<10+512])
	copy(want[3<<20-512:], noise[:5*512])
	copy(want[6<<20-1024:], noise)
	raw, qcow := filepath.Join(dir, "a.raw"), filepath.Join(dir, "a.qcow2")
	testenv.Check(t, os.WriteFile(raw, want, 0o600))
	tool(t, dir, "qemu-img", "convert", "-S", "512", "-o", "cluster_size=512", "-f", "raw", "-O", "qcow2", raw, qcow)
	for _, from := range []string{raw, qcow, compress(t, raw, "gzip", ".gz")} {
		imports(t, from, ImportOptions{}, want)
	}
	out, err := create(filepath.Join(dir, "other.raw"), false)
	testenv.Check(t, err)
	defer out.abandon()
	if out.direct == nil {
		t.Logf("%s does not write past the page cache", dir)
	}
	// A device with blocks that are larger takes no such write: it is made in the other way.
	testenv.Check(t, out.Truncate(int64(len(want))))
	c := copier{out: out}
	buf := alignedBuffer()
	copy(buf[1:], noise)
	testenv.Check(t, c.writeRun(buf[1:][:1<<20], 4096))
	got := make([]byte, 1<<20)
	if _, err := out.ReadAt(got, 4096); err != nil || !bytes.Equal(got, noise[:1<<20]) {
		t.Errorf("what was written from anywhere in memory: %v, or other bytes", err)
	}
}
