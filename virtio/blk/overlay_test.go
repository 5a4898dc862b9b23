package blk

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	disks "github.com/govmm/govmm/image"
	"github.com/govmm/govmm/internal/testenv"
	"golang.org/x/sys/unix"
)

// asQcow2 makes an image of a raw file, compressed where it can be.
func asQcow2(t *testing.T, raw string, args ...string) string {
	t.Helper()
	testenv.NeedTools(t, "qemu-img")
	path := raw + ".qcow2"
	if out, err := exec.Command("qemu-img", append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, args...), raw, path)...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

// An ephemeral disk reads as its image until it is written, and then as it was written; the
// image stays as it was, and nothing is left in the directory.
func TestEphemeral(t *testing.T) {
	const size = 40<<20 + 512 // parts of three pages of sectors
	raw := newImage(t, size)
	whole, err := os.ReadFile(raw)
	testenv.Check(t, err)
	clear(whole[3<<20 : 9<<20])
	testenv.Check(t, os.WriteFile(raw, whole, 0o600))
	for name, c := range map[string]Config{
		"raw":        {Path: raw, Ephemeral: true},
		"qcow2":      {Path: asQcow2(t, raw), Ephemeral: true, Format: disks.QCOW2},
		"compressed": {Path: asQcow2(t, raw, "-c", "-o", "cluster_size=512k"), Ephemeral: true, Format: disks.QCOW2},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			t.Setenv("TMPDIR", dir)
			before, err := os.ReadFile(c.Path)
			testenv.Check(t, err)
			testenv.Check(t, os.Chmod(c.Path, 0o400))
			d := open(t, c)
			testenv.Check(t, d.Lock())
			if d.Size() != size {
				t.Fatalf("%d bytes", d.Size())
			}
			writesAsModel(t, d.image, bytes.Clone(whole))
			testenv.Check(t, d.Sync())
			if after, err := os.ReadFile(c.Path); err != nil || !bytes.Equal(before, after) {
				t.Errorf("the image has changed (%v)", err)
			}
			if files, err := os.ReadDir(dir); err != nil || len(files) > 0 {
				t.Errorf("%v, %v", files, err)
			}
		})
	}
}

// writesAsModel reads, writes, zeroes and discards anywhere, and compares with a slice. What
// was discarded reads as zeros.
func writesAsModel(t *testing.T, im *image, model []byte) {
	t.Helper()
	r := rand.New(rand.NewPCG(3, 4))
	var s scratch
	for i := range 600 {
		n := SectorSize * (1 + r.IntN(1<<r.IntN(12)))
		off := SectorSize * r.IntN((len(model)-n)/SectorSize+1)
		bufs := [][]byte{make([]byte, n/2), make([]byte, n-n/2)}
		var err error
		switch r.IntN(5) {
		case 0:
			for _, b := range bufs {
				for j := range b {
					b[j] = byte(i) | 1
				}
			}
			copyTo2(model[off:], bufs)
			err = im.write(bufs, int64(off), r.IntN(2) == 0, &s)
		case 1:
			clear(model[off : off+n])
			err = im.zero(int64(off), int64(n), r.IntN(2) == 0, false, &s)
		case 2:
			clear(model[off : off+n])
			err = im.discard(int64(off), int64(n))
		default:
			err = im.read(bufs, int64(off), &s)
			if got := bytes.Join(bufs, nil); !bytes.Equal(got, model[off:off+n]) {
				t.Fatalf("step %d: %d bytes at %d differ", i, n, off)
			}
		}
		if err != nil {
			t.Fatalf("step %d: %d bytes at %d: %v", i, n, off, err)
		}
	}
	got := make([]byte, len(model))
	testenv.Check(t, im.read([][]byte{got}, 0, &s))
	if !bytes.Equal(got, model) {
		t.Error("the whole disk differs")
	}
}

func copyTo2(to []byte, bufs [][]byte) {
	for _, b := range bufs {
		to = to[copy(to, b):]
	}
}

// The last sector of a disk that ends within it is filled with zeros.
func TestEphemeralOddSize(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.img")
	testenv.Check(t, os.WriteFile(path, []byte("begin"), 0o600))
	d := open(t, Config{Path: path, Ephemeral: true})
	got := make([]byte, SectorSize)
	testenv.Check(t, d.image.read([][]byte{got}, 0, new(scratch)))
	if string(bytes.TrimRight(got, "\x00")) != "begin" {
		t.Errorf("%q", got)
	}
}

// An image that somebody writes is not read; two disks may read the same one.
func TestEphemeralLocks(t *testing.T) {
	path := newImage(t, 1<<20)
	writer, one, two := open(t, Config{Path: path}), open(t, Config{Path: path, Ephemeral: true}), open(t, Config{Path: path, Ephemeral: true})
	testenv.Check(t, writer.Lock())
	if err := one.Lock(); !errors.Is(err, ErrInUse) {
		t.Error(err)
	}
	testenv.Check(t, writer.Unlock())
	testenv.Check(t, one.Lock())
	testenv.Check(t, two.Lock())
	if err := writer.Lock(); !errors.Is(err, ErrInUse) {
		t.Error(err)
	}
}

// An ephemeral disk neither moves nor arrives.
func TestEphemeralStays(t *testing.T) {
	spec := &Spec{Config: Config{Path: "/a.img", Ephemeral: true}}
	if err := spec.Stays(); err == nil || !strings.Contains(err.Error(), "disk /a.img is ephemeral") {
		t.Error(err)
	}
	if err := spec.Move(nil); err == nil {
		t.Error("it arrived")
	}
	if f := spec.FeaturesInUse(); len(f) != 1 || f[0] != "ephemeral" {
		t.Errorf("%q", f)
	}
	other := &Spec{Config: Config{Path: "/a.img"}}
	if err := other.Move(spec); err == nil || !strings.Contains(err.Error(), "ephemeral") {
		t.Error(err)
	}
	if other.FeaturesInUse() != nil || other.Stays() != nil {
		t.Error("a disk that is not ephemeral says so")
	}
}

// What a flag says decides what a file is opened as; with ephemeral, its name does too.
func TestFormatOfDisk(t *testing.T) {
	for option, want := range map[string]string{
		"path=a.qcow2,ephemeral":                 "path=a.qcow2,format=qcow2,ephemeral",
		"a.qcow2,ephemeral":                      "path=a.qcow2,format=qcow2,ephemeral",
		"path=a.img,format=qcow2,ephemeral":      "path=a.img,format=qcow2,ephemeral",
		"path=a.qcow2,format=raw,ephemeral":      "path=a.qcow2,format=raw,ephemeral",
		"path=a.img,ephemeral":                   "path=a.img,ephemeral",
		"path=a.qcow2":                           "path=a.qcow2",
		"path=a.qcow2,format=raw":                "path=a.qcow2,format=raw",
		"path=a.img,format=qcow2":                "never written",
		"path=a.img,ephemeral,readonly":          "exclude each other",
		"path=a.img,ephemeral,direct":            "exclude each other",
		"path=a.img,format=vmdk,ephemeral":       "only raw and qcow2 are known",
		"path=a.img,ephemeral=maybe":             "neither on nor off",
		"path=a.qcow2,format=qcow2,readonly":     "never written",
		"path=a.img,format=qcow2,format=raw":     "given twice",
		"path=a.qcow2,format=qcow2,ephemeral=no": "never written",
	} {
		c, err := ParseConfig(option)
		if got := c.String(); err == nil && got != want {
			t.Errorf("%s: %s", option, got)
		} else if err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", option, err)
		} else if again, err2 := ParseConfig(got); err == nil && (err2 != nil || again != c) {
			t.Errorf("%s: %s is not the same: %v", option, got, err2)
		}
	}
}

// A raw image that begins as qcow2 is refused by an ephemeral disk as by any.
func TestEphemeralRefuses(t *testing.T) {
	path := asQcow2(t, newImage(t, 1<<20))
	other := strings.TrimSuffix(path, ".qcow2") + ".disk"
	testenv.Check(t, os.Rename(path, other))
	if _, err := Open(Config{Path: other, Ephemeral: true}, nil); !errors.Is(err, ErrNotRaw) || !strings.Contains(err.Error(), "format=qcow2,ephemeral") {
		t.Error(err)
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	testenv.Check(t, unix.Mkfifo(fifo, 0o600))
	for _, path := range []string{fifo, "/none"} {
		if _, err := Open(Config{Path: path, Ephemeral: true}, nil); err == nil {
			t.Errorf("%s was opened", path)
		}
	}
	t.Setenv("TMPDIR", "/none")
	if _, err := Open(Config{Path: other, Ephemeral: true, Format: disks.QCOW2}, nil); err == nil || !strings.Contains(err.Error(), "TMPDIR") {
		t.Error(err)
	}
}
