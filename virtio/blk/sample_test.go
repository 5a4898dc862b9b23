package blk

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/govmm/govmm/internal/strictcbor"
)

var testNonce = [16]byte{1, 2, 3}

// sampleOf describes a disk as a source on this host, or on another one.
func sampleOf(t testing.TB, d *Device, here bool) []byte {
	t.Helper()
	b, err := d.Sample(t.Context(), testNonce)
	if err != nil {
		t.Fatal(err)
	}
	if here {
		return b
	}
	return changed(t, b, func(s *sample) { s.Kernel = "another kernel" })
}

// changed is a sample with other values.
func changed(t testing.TB, b []byte, change func(*sample)) []byte {
	t.Helper()
	var s sample
	if err := strictcbor.Unmarshal(b, &s); err != nil {
		t.Fatal(err)
	}
	change(&s)
	b, err := strictcbor.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// copyOf makes a copy of a file, with changes.
func copyOf(t testing.TB, path string, change func([]byte)) string {
	t.Helper()
	b := content(t, path)
	change(b)
	other := filepath.Join(t.TempDir(), "copy.img")
	if err := os.WriteFile(other, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return other
}

// The disk of the destination is known by more than its size.
func TestOtherImageIsNoticed(t *testing.T) {
	const size = 1<<20 + 512 // the last block is not whole
	path := newImage(t, size)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	at := func(off int) func([]byte) { return func(b []byte) { b[off]++ } }
	same := func([]byte) {}
	for _, c := range []struct {
		name     string
		path     string
		here     bool // both sides are on one host
		readOnly bool
		warns    bool
		says     string
	}{
		{name: "the same file", path: path, here: true},
		{name: "the same file by a link", path: link, here: true},
		{name: "the same file at another host", path: path},
		{name: "a copy on the same host", path: copyOf(t, path, same), here: true, warns: true},
		{name: "a copy of what nobody writes", path: copyOf(t, path, same), here: true, readOnly: true},
		{name: "another first byte on the same host", path: copyOf(t, path, at(0)), here: true, says: "found another one with other bytes at offset 0"},
		{name: "zeros", path: copyOf(t, path, func(b []byte) { clear(b) }), says: "found other bytes at offset 0"},
		{name: "another first byte", path: copyOf(t, path, at(0)), says: "found other bytes at offset 0"},
		{name: "another last byte", path: copyOf(t, path, at(size-1)), says: "found other bytes at offset 1048576"},
		{name: "another last byte that is only read", path: copyOf(t, path, at(size-1)), here: true, readOnly: true, says: "found other bytes"},
	} {
		for _, direct := range []bool{false, true} {
			src := open(t, Config{Path: path, ReadOnly: c.readOnly})
			dst := open(t, Config{Path: c.path, ReadOnly: c.readOnly, Direct: direct})
			var log strings.Builder
			dst.log = slog.New(slog.NewTextHandler(&log, nil))
			b := sampleOf(t, src, c.here)
			switch err := dst.Compare(t.Context(), testNonce, b); {
			case c.says == "" && err != nil:
				t.Errorf("%s: %v", c.name, err)
			case c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says) ||
				!strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), c.path)):
				t.Errorf("%s: %v, want %q, and both paths", c.name, err, c.says)
			}
			if warned := strings.Contains(log.String(), "another file than at the source"); warned != c.warns {
				t.Errorf("%s: the log is %q", c.name, log.String())
			}
		}
	}
}

// An old copy lacks what the guest wrote last; so it is noticed however large the image
// is, also after the guest has moved once and written nothing since.
func TestOldCopyIsNoticed(t *testing.T) {
	path := newImage(t, 64<<10)
	old := copyOf(t, path, func([]byte) {})
	if err := errors.Join(os.Truncate(path, 1<<40), os.Truncate(old, 1<<40)); err != nil {
		t.Fatal(err)
	}
	src, dst, wrong := open(t, Config{Path: path}), open(t, Config{Path: path}), open(t, Config{Path: old})
	if err := wrong.Compare(t.Context(), testNonce, sampleOf(t, src, false)); err != nil {
		t.Fatalf("a copy that is still the same: %v", err)
	}
	r := newRig(t, src, layouts["split"])
	copy(r.data(512), bytes.Repeat([]byte{0x55}, 512))
	const off = 123 << 30
	status, _ := r.do(typeOut, off/512, 512, false)
	want(t, "write", status, statusOK)
	if err := dst.Compare(t.Context(), testNonce, sampleOf(t, src, true)); err != nil {
		t.Fatal(err)
	}
	for _, d := range []*Device{src, dst} {
		err := wrong.Compare(t.Context(), testNonce, sampleOf(t, d, false))
		if err == nil || !strings.Contains(err.Error(), "found other bytes at offset 132070244352") {
			t.Errorf("an old copy: %v", err)
		}
	}
}

// Images that are mostly holes are compared where they have data, and one that is in
// use by somebody else besides is said to be.
func TestSparseImagesDiffer(t *testing.T) {
	var paths [2]string
	for i := range paths {
		paths[i] = filepath.Join(t.TempDir(), "sparse.img")
		f, err := os.Create(paths[i])
		if err == nil {
			_, err = f.WriteAt([]byte{byte(i) + 1}, 7<<30)
		}
		if err = errors.Join(err, f.Truncate(1<<40), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	src, dst, user := open(t, Config{Path: paths[0]}), open(t, Config{Path: paths[1]}), open(t, Config{Path: paths[1]})
	if err := errors.Join(src.Lock(), user.Lock()); err != nil {
		t.Fatal(err)
	}
	err := dst.Compare(t.Context(), testNonce, sampleOf(t, src, true))
	if err == nil || !strings.Contains(err.Error(), "found another one with other bytes at offset 7516192768") ||
		!strings.Contains(err.Error(), "disk "+paths[1]+": lock: another process or disk uses it") {
		t.Errorf("%v", err)
	}
}

// What cannot be read, or is not all there, is an error that says so; so is storage
// that does not answer, and a flush that fails.
func TestSampleFails(t *testing.T) {
	path := newImage(t, 64<<10)
	src, dst := open(t, Config{Path: path}), open(t, Config{Path: path})
	good := sampleOf(t, src, false)
	fails := func(what string, err error, says string) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), "disk "+path) {
			t.Errorf("%s: %v, want %q", what, err, says)
		}
	}
	if err := os.Truncate(path, 63<<10); err != nil {
		t.Fatal(err)
	}
	fails("truncated at the destination", dst.Compare(t.Context(), testNonce, good), "read at offset 61440: expected 4096 bytes, found 3072")
	_, err := src.Sample(t.Context(), testNonce)
	fails("truncated at the source", err, "read at offset 61440: expected 4096 bytes, found 3072")
	if err := os.Truncate(path, 64<<10); err != nil {
		t.Fatal(err)
	}

	failing(src, 1)
	_, err = src.Sample(t.Context(), testNonce)
	fails("a flush that fails", err, "flush: input/output error")
	if !errors.Is(err, unix.EIO) {
		t.Errorf("%v", err)
	}
	src.flushes.forget()

	release := make(chan struct{})
	src.image.fdatasync = func(int) error { <-release; return nil }
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("cancelled on purpose"))
	_, err = src.Sample(ctx, testNonce)
	fails("storage that does not answer", err, "its storage does not answer: cancelled on purpose")
	close(release)

	for says, change := range map[string]func(*sample){
		"expected 131072 bytes as at the source, found 65536":          func(s *sample) { s.Size = 128 << 10 },
		"block 16 of 4096 bytes: must be within 65536 bytes":           func(s *sample) { s.Written = []uint64{16} },
		"6 and 13 blocks to be compared: must be at most 6 and 12":     func(s *sample) { s.Written = make([]uint64, 13) },
		"7 and 0 blocks to be compared":                                func(s *sample) { s.Data = make([]uint64, 7) },
		"bytes of hashes: must be":                                     func(s *sample) { s.Hashes = s.Hashes[1:] },
		"1 bytes of hashes: must be":                                   func(s *sample) { s.Hashes = []byte{1} },
		"found other bytes at offset 0":                                func(s *sample) { s.Hashes[0]++ },
		strings.Repeat("x", maxTold-1) + "\", found other bytes at of": func(s *sample) { s.Hashes[0]++; s.Path = "/" + strings.Repeat("x", 4000) },
	} {
		fails("a sample that is wrong", dst.Compare(t.Context(), testNonce, changed(t, good, change)), says)
	}
	fails("no sample", dst.Compare(t.Context(), testNonce, nil), "decode what the source says of it")
	if err := dst.Compare(t.Context(), [16]byte{9}, good); err == nil {
		t.Error("the nonce has no part in it")
	}
}

// The destination has opened the device long ago and read it: its cache is old. Two
// loop devices over one file have caches as two hosts have.
func TestOldCacheIsPassed(t *testing.T) {
	path := newImage(t, 1<<20)
	var devices [2]string
	for i := range devices {
		out, err := exec.Command("losetup", "--find", "--show", path).CombinedOutput()
		if err != nil {
			t.Skipf("SKIPPED: needs root and loop devices: %v: %s", err, out)
		}
		dev := strings.TrimSpace(string(out))
		t.Cleanup(func() {
			if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
		devices[i] = dev
	}
	src, dst := open(t, Config{Path: devices[0]}), open(t, Config{Path: devices[1]})
	if _, err := io.Copy(io.Discard, io.NewSectionReader(os.NewFile(uintptr(dup(t, dst.image.fd)), "dst"), 0, 1<<20)); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, src, layouts["split"])
	for sector := uint64(0); sector < 2048; sector += 128 {
		copy(r.data(64<<10), bytes.Repeat([]byte{byte(sector) + 1}, 64<<10))
		status, _ := r.do(typeOut, sector, 64<<10, false)
		want(t, "write", status, statusOK)
	}
	if err := dst.Compare(t.Context(), testNonce, sampleOf(t, src, false)); err != nil {
		t.Fatal(err)
	}
}

func dup(t *testing.T, fd int) int {
	t.Helper()
	fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// FuzzCompare: whatever a source says of a disk is taken only if it is true.
func FuzzCompare(f *testing.F) {
	d := open(f, Config{Path: newImage(f, 64<<10)})
	d.log = slog.New(slog.DiscardHandler) // a fuzz target's own log takes nothing then
	d.written.add(3)
	f.Add(sampleOf(f, d, true))
	f.Add(sampleOf(f, d, false))
	f.Fuzz(func(t *testing.T, b []byte) {
		if d.Compare(t.Context(), testNonce, b) != nil {
			return
		}
		var s sample
		if err := strictcbor.Unmarshal(b, &s); err != nil || s.check(d.image) != nil {
			t.Fatalf("%+v, %v", s, err)
		}
		hashes, err := d.image.hashes(testNonce, s.blocks(d.image, testNonce))
		if err != nil || !bytes.Equal(hashes, s.Hashes) {
			t.Fatalf("%x was taken for %x, %v", s.Hashes, hashes, err)
		}
	})
}

// BenchmarkSample is what comparing a disk costs each side in the stop, where reads come
// from the storage itself.
func BenchmarkSample(b *testing.B) {
	path := newImage(b, 64<<20)
	src, dst := open(b, Config{Path: path}), open(b, Config{Path: path})
	for b.Loop() {
		s, err := src.Sample(b.Context(), testNonce)
		if err == nil {
			err = dst.Compare(b.Context(), testNonce, s)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}
