package image

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
)

// tool runs a program of qemu-utils in a directory.
func tool(t testing.TB, dir, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

// diskBytes is the size of the disk of most tests: no multiple of a cluster.
const diskBytes = 9<<20 + 3*512

// content is a disk with data that compresses, data that does not, and zeros.
func content(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, size)
	for off := 0; off < size; {
		n := min(512<<r.IntN(9), size-off)
		switch part := b[off : off+n]; r.IntN(4) {
		case 0:
			for i := range part {
				part[i] = byte(r.Uint32())
			}
		case 1:
			word := fmt.Sprintf("%x, the same words again; ", r.Uint32())
			for i := range part {
				part[i] = word[i%len(word)]
			}
		}
		off += n
	}
	return b
}

// readsAsQEMU compares an image with what qemu-img convert makes of it: as a whole, in
// random pieces, and by its extents.
func readsAsQEMU(t *testing.T, path string) {
	t.Helper()
	want := filepath.Join(t.TempDir(), "want.raw")
	tool(t, filepath.Dir(path), "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, want)
	expected, err := os.ReadFile(want)
	testenv.Check(t, err)
	im, err := Open(path, QCOW2)
	testenv.Check(t, err)
	defer im.Close()
	if im.Size() != int64(len(expected)) {
		t.Fatalf("%d bytes, as QEMU reads it it has %d", im.Size(), len(expected))
	}
	got := make([]byte, len(expected))
	if n, err := im.ReadAt(got, 0); n != len(got) || err != nil {
		t.Fatalf("read %d of %d bytes: %v", n, len(got), err)
	}
	differs(t, "the disk", 0, got, expected)
	r := rand.New(rand.NewPCG(7, 7))
	for range 200 {
		off := r.IntN(len(expected))
		p := make([]byte, 1+r.IntN(200<<10))
		n, err := im.ReadAt(p, int64(off))
		whole := min(len(p), len(expected)-off)
		if n != whole || (n < len(p)) != (err == io.EOF) || err != nil && err != io.EOF {
			t.Fatalf("read %d bytes at %d: %d, %v", len(p), off, n, err)
		}
		differs(t, "a piece", off, p[:n], expected[off:off+n])
	}
	for off := int64(0); off < im.Size(); {
		n, zeros, err := im.Extent(off)
		if err != nil || n <= 0 || n > im.Size()-off {
			t.Fatalf("the extent at %d: %d bytes, %v", off, n, err)
		}
		if zeros && len(bytes.Trim(expected[off:off+n], "\x00")) > 0 {
			t.Fatalf("%d bytes at %d are not zeros", n, off)
		}
		off += n
	}
}

func differs(t *testing.T, what string, at int, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("%s, %d bytes at %d: byte %d is %#x, as QEMU reads it %#x", what, len(got), at, at+i, got[i], want[i])
		}
	}
}

// qemuOptions are sets of options of qemu-img create, each of which changes how an image is laid out.
var qemuOptions = []string{
	"compat=0.10", "compat=1.1",
	"compat=0.10,cluster_size=512", "compat=1.1,cluster_size=512", "cluster_size=1k", "cluster_size=4k", "cluster_size=16k", "cluster_size=1M", "cluster_size=2M",
	"refcount_bits=1", "refcount_bits=2", "refcount_bits=4", "refcount_bits=8", "refcount_bits=16", "refcount_bits=32", "refcount_bits=64",
	"lazy_refcounts=on", "preallocation=metadata", "preallocation=falloc", "preallocation=full",
	"extended_l2=on", "extended_l2=on,cluster_size=16k", "extended_l2=on,cluster_size=2M", "extended_l2=on,preallocation=metadata",
	"compression_type=zlib", "compression_type=zstd", "compression_type=zstd,cluster_size=512", "compression_type=zstd,cluster_size=2M",
	"compression_type=zstd,extended_l2=on",
}

// An image that qemu-img made with any option reads as qemu-img reads it: converted,
// compressed, and written by QEMU afterwards.
func TestReadsAsQEMU(t *testing.T) {
	testenv.NeedTools(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	raw := filepath.Join(dir, "source.raw")
	testenv.Check(t, os.WriteFile(raw, content(1, diskBytes), 0o600))
	for i, options := range qemuOptions {
		for _, compress := range []bool{false, true} {
			if compress && strings.Contains(options, "preallocation") {
				continue // QEMU does not compress these
			}
			t.Run(fmt.Sprintf("%s,compressed=%t", options, compress), func(t *testing.T) {
				t.Parallel()
				path := filepath.Join(t.TempDir(), "a.qcow2")
				args := []string{"convert", "-f", "raw", "-O", "qcow2", "-o", options}
				if compress {
					args = append(args, "-c")
				}
				tool(t, dir, "qemu-img", append(args, raw, path)...)
				readsAsQEMU(t, path)
				// Reference counts of 1 and 2 bits are too small for a snapshot of these.
				writeByQEMU(t, path, uint64(i), options != "refcount_bits=1" && options != "refcount_bits=2")
				readsAsQEMU(t, path)
			})
		}
	}
}

// writeByQEMU writes data, zeros and discards anywhere, with a snapshot in between.
func writeByQEMU(t *testing.T, path string, seed uint64, snapshot bool) {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 2))
	for round := range 2 {
		args := []string{"-f", "qcow2", "-d", "unmap"}
		for range 40 {
			n := 512 * (1 + r.IntN(400))
			off := 512 * r.IntN((diskBytes-n)/512)
			verb := []string{"write -P %d", "write -z", "write -z -u", "discard"}[r.IntN(4)]
			if strings.Contains(verb, "%d") {
				verb = fmt.Sprintf(verb, 1+r.IntN(255))
			}
			args = append(args, "-c", fmt.Sprintf("%s %d %d", verb, off, n))
		}
		tool(t, filepath.Dir(path), "qemu-io", append(args, path)...)
		if round == 0 && snapshot {
			tool(t, filepath.Dir(path), "qemu-img", "snapshot", "-c", "before", path)
		}
	}
}

// A chain of images, of different formats and sizes, reads as qemu-img reads it.
func TestBackingChains(t *testing.T) {
	testenv.NeedTools(t, "qemu-img", "qemu-io")
	for i, c := range []struct{ top, middle, below string }{
		{"compat=1.1", "compat=1.1", "raw"},
		{"extended_l2=on", "compat=0.10", "raw"},
		{"cluster_size=512", "cluster_size=2M", "qcow2"},
		{"extended_l2=on,cluster_size=2M", "extended_l2=on,cluster_size=16k", "qcow2"},
		{"compression_type=zstd", "cluster_size=4k", "qcow2"},
	} {
		for _, sizes := range [][3]int{{diskBytes, diskBytes, diskBytes}, {diskBytes + 5<<20, diskBytes, 2<<20 + 512}, {diskBytes, diskBytes + 1<<20, 2*diskBytes + 512}} {
			t.Run(fmt.Sprintf("%s over %s over %s, %d", c.top, c.middle, c.below, sizes), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				testenv.Check(t, os.WriteFile(filepath.Join(dir, "source.raw"), content(uint64(i), sizes[2]), 0o600))
				below := "source.raw"
				if c.below == "qcow2" {
					below = "below.qcow2"
					tool(t, dir, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "source.raw", below)
				}
				tool(t, dir, "qemu-img", "create", "-f", "qcow2", "-o", c.middle, "-b", below, "-F", c.below, "middle.qcow2", fmt.Sprint(sizes[1]))
				writeByQEMU(t, filepath.Join(dir, "middle.qcow2"), uint64(i), true)
				tool(t, dir, "qemu-img", "create", "-f", "qcow2", "-o", c.top, "-b", "middle.qcow2", "-F", "qcow2", "top.qcow2", fmt.Sprint(sizes[0]))
				readsAsQEMU(t, filepath.Join(dir, "top.qcow2"))
				writeByQEMU(t, filepath.Join(dir, "top.qcow2"), uint64(i)+100, true)
				readsAsQEMU(t, filepath.Join(dir, "top.qcow2"))
			})
		}
	}
}

// Reading changes nothing in an image.
func TestReadsOnly(t *testing.T) {
	testenv.NeedTools(t, "qemu-img")
	dir := t.TempDir()
	path := filepath.Join(dir, "a.qcow2")
	testenv.Check(t, os.WriteFile(filepath.Join(dir, "source.raw"), content(3, diskBytes), 0o600))
	tool(t, dir, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "source.raw", path)
	sum := func() [32]byte {
		b, err := os.ReadFile(path)
		testenv.Check(t, err)
		return sha256.Sum256(b)
	}
	before := sum()
	testenv.Check(t, os.Chmod(path, 0o400))
	readsAsQEMU(t, path)
	if sum() != before {
		t.Error("the image has changed")
	}
}
