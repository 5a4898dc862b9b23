package image

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/govmm/govmm/internal/testenv"
)

// marker is in a file outside of the directory of an image.
const marker = "this belongs to somebody else, whom no image may name"

// wrapped compresses b as a whole, in the way that how says.
func wrapped(t testing.TB, b []byte, how uint8) []byte {
	t.Helper()
	var out bytes.Buffer
	var w io.WriteCloser
	var err error
	switch how % 4 {
	case 1:
		w = gzip.NewWriter(&out)
	case 2:
		w, err = xz.NewWriter(&out)
	case 3:
		w, err = zstd.NewWriter(&out)
	default:
		return b
	}
	if err == nil {
		_, err = w.Write(b)
	}
	if err == nil {
		err = w.Close()
	}
	testenv.Check(t, err)
	return out.Bytes()
}

// fuzzImages are images as they should be, as small as they can.
func fuzzImages(f *testing.F) (list [][]byte) {
	f.Helper()
	testenv.NeedTools(f, "qemu-img")
	dir := f.TempDir()
	testenv.Check(f, os.WriteFile(filepath.Join(dir, "below.qcow2"), content(1, 40<<10), 0o600))
	for _, args := range [][]string{
		{"convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=512", "below.qcow2", "a"},
		{"convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "below.qcow2", "a"},
		{"convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k,compression_type=zstd", "below.qcow2", "a"},
		{"convert", "-f", "raw", "-O", "qcow2", "-o", "extended_l2=on,cluster_size=16k", "below.qcow2", "a"},
		{"create", "-u", "-f", "qcow2", "-o", "cluster_size=512", "-b", "below.qcow2", "-F", "qcow2", "a", "50K"},
		{"create", "-u", "-f", "qcow2", "-o", "cluster_size=512", "-b", "below.qcow2", "-F", "raw", "a", "50K"},
		{"create", "-u", "-f", "qcow2", "-o", "cluster_size=512", "-b", "a.qcow2", "-F", "qcow2", "a", "50K"},
		{"create", "-u", "-f", "qcow2", "-o", "cluster_size=512", "-b", "../secret.raw", "-F", "raw", "a", "50K"},
		{"create", "-u", "-f", "qcow2", "-o", "cluster_size=512", "-b", "link.raw", "-F", "raw", "a", "50K"},
	} {
		tool(f, dir, "qemu-img", args...)
		b, err := os.ReadFile(filepath.Join(dir, "a"))
		testenv.Check(f, err)
		list = append(list, b)
	}
	return list
}

// FuzzImport: whatever two files say, of which one may be below the other, and which may be
// compressed as a whole, an import ends soon, with a disk or with nothing; it takes
// little memory, leaves both as they are, and has nothing of files that lie elsewhere.
func FuzzImport(f *testing.F) {
	list := fuzzImages(f)
	for i, b := range list {
		f.Add(b, list[i%4], uint8(i), i%2 == 0)
		f.Add(b, list[i%4], uint8(0), true)
	}
	f.Add(wrapped(f, list[0], 1), list[0], uint8(0), false)
	f.Add(wrapped(f, list[0], 2), list[0], uint8(0), false)
	f.Add(wrapped(f, list[0], 3), list[0], uint8(0), false)
	f.Fuzz(func(t *testing.T, top, below []byte, how uint8, named bool) {
		root := t.TempDir()
		dir := filepath.Join(root, "images")
		testenv.Check(t, os.Mkdir(dir, 0o700))
		testenv.Check(t, os.WriteFile(filepath.Join(root, "secret.raw"), bytes.Repeat([]byte(marker), 1000), 0o600))
		testenv.Check(t, os.Symlink("../secret.raw", filepath.Join(dir, "link.raw")))
		top = wrapped(t, top, how)
		testenv.Check(t, os.WriteFile(filepath.Join(dir, "a.qcow2"), top, 0o600))
		testenv.Check(t, os.WriteFile(filepath.Join(dir, "below.qcow2"), below, 0o600))
		o := ImportOptions{}
		if named {
			o.Format = QCOW2
		}
		// What is small may be a large disk: somebody interrupts that.
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		began := time.Now()
		to := filepath.Join(dir, "out.raw")
		done, err := Import(ctx, filepath.Join(dir, "a.qcow2"), to, o)
		if took := time.Since(began); took > testenv.Patience {
			t.Errorf("it took %v", took)
		}
		var mem runtime.MemStats
		if runtime.ReadMemStats(&mem); mem.HeapInuse > 1<<30 {
			t.Errorf("%d MiB of memory are in use", mem.HeapInuse>>20)
		}
		left := []string{filepath.Join(dir, "a.qcow2"), filepath.Join(dir, "below.qcow2"), filepath.Join(dir, "link.raw")}
		if err == nil {
			left = append(left, to)
			checkDisk(t, to, done)
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("an error of several lines: %q", err)
		}
		alone(t, left...)
		for i, b := range [][]byte{top, below} {
			if now, err := os.ReadFile(left[i]); err != nil || !bytes.Equal(now, b) {
				t.Errorf("%s has changed: %v", left[i], err)
			}
		}
	})
}

// checkDisk checks a disk that was imported.
func checkDisk(t *testing.T, path string, done Imported) {
	t.Helper()
	st, err := os.Stat(path)
	testenv.Check(t, err)
	if st.Size() != done.Size || st.Size() == 0 || st.Size()%SectorSize != 0 || allocated(st) > done.Written+1<<20 {
		t.Errorf("a disk of %d bytes, of which %d are stored: %+v", st.Size(), allocated(st), done)
	}
	if st.Size() > 1<<20 {
		return
	}
	b, err := os.ReadFile(path)
	testenv.Check(t, err)
	if bytes.Contains(b, []byte(marker)) {
		t.Error("the disk has a file that lies elsewhere")
	}
}

// A file of xz says how much memory it takes; too much is refused.
func TestXzTakesBoundedMemory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.raw.xz")
	b := wrapped(t, content(1, 1<<20), 2)
	testenv.Check(t, os.WriteFile(path, b, 0o600))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	imports(t, path, ImportOptions{}, content(1, 1<<20))
	if runtime.ReadMemStats(&after); after.TotalAlloc-before.TotalAlloc > 64<<20 {
		t.Errorf("%d MiB were allocated for a file that says 8", (after.TotalAlloc-before.TotalAlloc)>>20)
	}
	// Any block of any stream may ask for much.
	var blocks bytes.Buffer
	w, err := xz.WriterConfig{BlockSize: 300 << 10, DictCap: 1 << 20}.NewWriter(&blocks)
	testenv.Check(t, err)
	_, err = w.Write(content(1, 1<<20))
	testenv.Check(t, errors.Join(err, w.Close()))
	header := bytes.Clone(blocks.Bytes()[12:24])
	if n := bytes.Count(blocks.Bytes(), header); n != 4 {
		t.Fatalf("%d blocks begin with % x", n, header)
	}
	padding := make([]byte, 8)
	whole := slices.Concat(blocks.Bytes(), padding, blocks.Bytes(), blocks.Bytes())
	testenv.Check(t, os.WriteFile(path, whole, 0o600))
	imports(t, path, ImportOptions{}, slices.Concat(content(1, 1<<20), content(1, 1<<20), content(1, 1<<20)))
	for i, at := 0, 0; i < 12; i++ {
		at += bytes.Index(whole[at:], header)
		greedy := bytes.Clone(whole)
		greedy[at+4] = 32 // 256 MiB
		binary.LittleEndian.PutUint32(greedy[at+8:], crc32.ChecksumIEEE(greedy[at:at+8]))
		testenv.Check(t, os.WriteFile(path, greedy, 0o600))
		if _, err := Import(context.Background(), path, path+".out", ImportOptions{}); err == nil || !strings.Contains(err.Error(), "it refers back 256 MiB: expected at most 128 MiB") {
			t.Errorf("block %d: %v", i, err)
		}
		at += len(header)
	}
}

// Each frame of zstd says how much memory it takes; too much is refused.
func TestZstdTakesBoundedMemory(t *testing.T) {
	frame := func(window byte) []byte { return []byte{0x28, 0xb5, 0x2f, 0xfd, 0, window, 9, 0, 0, 'x'} }
	for window, ok := range map[byte]bool{17 << 3: true, 18 << 3: false} { // 128 and 256 MiB
		r, err := decompressFrom(bytes.NewReader(slices.Concat(frame(0), frame(window))), "zstd")
		testenv.Check(t, err)
		got, err := io.ReadAll(r)
		if ok && (err != nil || string(got) != "xx") || !ok && (err == nil || !strings.Contains(err.Error(), "window size exceeded")) {
			t.Errorf("window %#x: %q, %v", window, got, err)
		}
		_ = r.Close()
	}
}
