package snapshot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

const testPages = 20 << 20 / mempage.Size // more than one unit

// description is that of a machine, as far as a keeper looks at it.
func description(t testing.TB) []byte {
	t.Helper()
	b, err := strictcbor.Marshal(map[string]any{"name": "vm", "cpus": 1, "memory": uint64(testPages * mempage.Size),
		"kernel": []byte("a kernel"), "initrd": []byte("an initrd")})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// kept makes a snapshot by the calls that a migration makes, and returns what its memory has.
func kept(t testing.TB, dir string, opt Options) (content []byte) {
	t.Helper()
	k := &keeper{dir: dir, opt: opt.withDefaults()}
	target, err := k.Build(t.Context(), description(t))
	if err != nil {
		t.Fatal(err)
	}
	d := target.(*draft)
	content = make([]byte, testPages*mempage.Size)
	r := rand.New(rand.NewPCG(1, 2))
	for range 60 {
		first := r.Uint64N(testPages/64) * 64
		n := min(1+r.Uint64N(1024), testPages-first)
		span := content[first*mempage.Size:][:n*mempage.Size]
		if r.IntN(4) == 0 {
			if err := d.Zero(0, first, n); err != nil {
				t.Fatal(err)
			}
			clear(span)
			continue
		}
		data := mempage.NewBitmap(n)
		for i := range n {
			if r.IntN(3) > 0 {
				data.Set(i)
				b := byte(r.Uint32())
				for j := range mempage.Size {
					span[i*mempage.Size+uint64(j)] = b
				}
			}
		}
		if err := d.WritePages(0, first, span, data); err != nil {
			t.Fatal(err)
		}
	}
	ctx := context.Background()
	if err := errors.Join(d.CompareStorage(ctx, [16]byte{1, 2, 3}, []byte{0x80}), d.PrepareState([]byte("a state")), d.LoadState(ctx, nil), d.UnloadState(ctx),
		d.PrepareState([]byte("the state")), d.LoadState(ctx, nil), d.Start(ctx, false), d.Discard()); err != nil {
		t.Fatal(err)
	}
	if w := (&Keeper{builder: k}).Work(); w != (Work{}) {
		t.Errorf("it still does %+v", w)
	}
	return content
}

// What is kept is read back as it was, and nothing else is left in the directory.
func TestKeepAndRead(t *testing.T) {
	for _, c := range []Compression{CompressNone, CompressZstd} {
		t.Run(string(c), func(t *testing.T) {
			above := t.TempDir()
			dir := filepath.Join(above, "one")
			content := kept(t, dir, Options{Compress: c, Version: "v1"})
			if list, err := os.ReadDir(above); err != nil || len(list) != 1 {
				t.Errorf("beside the snapshot there is %v, %v", list, err)
			}
			s, err := Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if n := s.Read(); n != 0 {
				t.Errorf("%d bytes were read by opening it", n)
			}
			if err := s.Verify(t.Context()); err != nil {
				t.Error(err)
			}
			ram := make([]byte, len(content))
			if err := s.readMemory(t.Context(), ram); err != nil || !bytes.Equal(ram, content) {
				t.Errorf("memory differs: %v", err)
			}
			if n := s.Read(); n != 2*uint64(len(content)) {
				t.Errorf("%d bytes were read, want twice %d", n, len(content))
			}
			for name, want := range map[string]string{stateFile: "the state", kernelFile: "a kernel", initrdFile: "an initrd"} {
				if got, err := s.part(name); err != nil || string(got) != want {
					t.Errorf("%s: %q, %v", name, got, err)
				}
			}
			mapped, err := s.mapPart(kernelFile)
			if err != nil || string(mapped) != "a kernel" {
				t.Errorf("the kernel is mapped as %q, %v", mapped, err)
			}
			if len(s.hot) == 0 || s.session() != [16]byte{1, 2, 3} {
				t.Errorf("%d hot ranges, session %x", len(s.hot), s.session())
			}
			if _, err := CheckNew(dir); !errors.Is(err, os.ErrExist) {
				t.Errorf("a snapshot in its place: %v", err)
			}
		})
	}
}

// What is done of the memory is counted, while it is made durable and its sum is made.
func TestWorkIsCounted(t *testing.T) {
	for _, c := range []Compression{CompressNone, CompressZstd} {
		k := &keeper{dir: filepath.Join(t.TempDir(), "one"), opt: Options{Compress: c}.withDefaults()}
		target, err := k.Build(t.Context(), description(t))
		if err != nil {
			t.Fatal(err)
		}
		d := target.(*draft)
		keeper := &Keeper{builder: k}
		done := k.begins("writing memory", d.desc.Memory)
		if w := keeper.Work(); w != (Work{"writing memory", 0, d.desc.Memory}) {
			t.Errorf("%s: at first %+v", c, w)
		}
		if c == CompressZstd {
			err = d.pack(t.Context(), done)
		} else {
			_, _, err = d.sum(t.Context(), done)
		}
		if w := keeper.Work(); err != nil || w.Done != w.All {
			t.Errorf("%s: at the end %+v, %v", c, w, err)
		}
		if err := d.Discard(); err != nil {
			t.Error(err)
		}
	}
}

// A draft that is given up leaves nothing, and one that finds its name taken does not
// replace what is there.
func TestNothingIsLeft(t *testing.T) {
	above := t.TempDir()
	k := &keeper{dir: filepath.Join(above, "one"), opt: Options{}.withDefaults()}
	begin := func() *draft {
		t.Helper()
		target, err := k.Build(t.Context(), description(t))
		if err != nil {
			t.Fatal(err)
		}
		return target.(*draft)
	}
	d := begin()
	list, err := os.ReadDir(above)
	if err != nil || len(list) != 1 || !strings.HasPrefix(list[0].Name(), draftPrefix) {
		t.Errorf("a draft is %v, %v", list, err)
	}
	if err := d.Discard(); err != nil {
		t.Error(err)
	}
	d = begin()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.Start(ctx, false); !errors.Is(err, context.Canceled) {
		t.Errorf("a draft whose receiver ends: %v", err)
	}
	_ = d.Discard()
	d = begin()
	if err := os.Mkdir(k.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := d.Start(t.Context(), false); !errors.Is(err, os.ErrExist) {
		t.Errorf("the name is taken: %v", err)
	}
	_ = d.Discard()
	if list, _ := os.ReadDir(above); len(list) != 1 {
		t.Errorf("left: %v", list)
	}
}

// Whatever is done to a snapshot, one line says what is wrong, and nothing is made of it.
func TestRefused(t *testing.T) {
	change := func(name string, f func(b []byte) []byte) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			path := filepath.Join(dir, name)
			b, err := os.ReadFile(path)
			if err == nil {
				err = os.WriteFile(path, f(b), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	manifest := func(f func(m map[string]any)) func(t *testing.T, dir string) {
		return change(manifestFile, func(b []byte) []byte {
			var m map[string]any
			if err := json.Unmarshal(b, &m); err != nil {
				panic(err)
			}
			f(m)
			b, _ = json.Marshal(m)
			return b
		})
	}
	instead := func(name string, put func(path string) error) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			path := filepath.Join(dir, name)
			if err := errors.Join(os.Remove(path), put(path)); err != nil {
				t.Fatal(err)
			}
		}
	}
	none := func(string) error { return nil }
	flip := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
	cut := func(b []byte) []byte { return b[:len(b)-1] }
	ram := func(key string, v any) func(t *testing.T, dir string) {
		return manifest(func(m map[string]any) { m["memory"].(map[string]any)[key] = v })
	}
	plain, packed := filepath.Join(t.TempDir(), "plain"), filepath.Join(t.TempDir(), "packed")
	kept(t, plain, Options{})
	kept(t, packed, Options{Compress: CompressZstd})
	for name, c := range map[string]struct {
		packed bool
		damage func(t *testing.T, dir string)
		want   string
	}{
		"no manifest":           {false, instead(manifestFile, none), "manifest.json is missing"},
		"empty manifest":        {false, change(manifestFile, func([]byte) []byte { return nil }), "manifest.json"},
		"cut manifest":          {false, change(manifestFile, func(b []byte) []byte { return b[:len(b)/2] }), "manifest.json"},
		"more than a manifest":  {false, change(manifestFile, func(b []byte) []byte { return append(b, "{}"...) }), "after top-level value"},
		"huge manifest":         {false, change(manifestFile, func(b []byte) []byte { return append(b, make([]byte, maxManifest)...) }), "must be at most"},
		"other format":          {false, manifest(func(m map[string]any) { m["format"] = 0 }), "expected format 1, found 0"},
		"newer format":          {false, manifest(func(m map[string]any) { m["format"] = 2 }), "made by a newer govmm: format 2"},
		"newer feature":         {false, manifest(func(m map[string]any) { m["features"] = []string{"holograms"} }), `it uses "holograms"`},
		"unknown field":         {false, manifest(func(m map[string]any) { m["more"] = 1 }), "unknown field"},
		"name":                  {false, manifest(func(m map[string]any) { m["name"] = "../x" }), "name"},
		"memory too small":      {false, ram("bytes", 4096), "memory of 4096 bytes"},
		"memory of another":     {false, ram("bytes", testPages*mempage.Size+mempage.Size), "memory: expected 20975616 bytes, found 20971520"},
		"packed it is not":      {false, ram("compression", "zstd"), "memory is kept as"},
		"no sum":                {false, ram("sha256", "x"), "expected a SHA-256"},
		"part of another name":  {false, manifest(func(m map[string]any) { m["parts"].(map[string]any)["../../x"] = Part{} }), "does not know it"},
		"part is missing":       {false, manifest(func(m map[string]any) { delete(m["parts"].(map[string]any), stateFile) }), "state.cbor is missing"},
		"part that lies":        {false, manifest(func(m map[string]any) { m["parts"].(map[string]any)[stateFile].(map[string]any)["bytes"] = 1 << 40 }), "must be at most"},
		"negative part":         {false, manifest(func(m map[string]any) { m["parts"].(map[string]any)[stateFile].(map[string]any)["bytes"] = -1 }), "must be at most"},
		"state changed":         {false, change(stateFile, flip), "state.cbor: its content is not what was written"},
		"state cut":             {false, change(stateFile, cut), "state.cbor: expected 9 bytes, found 8"},
		"state longer":          {false, change(stateFile, func(b []byte) []byte { return append(b, 0) }), "state.cbor of 10 bytes"},
		"state is missing":      {false, instead(stateFile, none), "state.cbor is missing"},
		"state is a directory":  {false, instead(stateFile, func(p string) error { return os.Mkdir(p, 0o700) }), "state.cbor: expected a file"},
		"state is a FIFO":       {false, instead(stateFile, func(p string) error { return unix.Mkfifo(p, 0o600) }), "state.cbor: expected a file"},
		"state is a link":       {false, instead(stateFile, func(p string) error { return os.Symlink("/etc/passwd", p) }), "found a link"},
		"manifest is a link":    {false, instead(manifestFile, func(p string) error { return os.Symlink("/dev/zero", p) }), "found a link"},
		"memory is a device":    {false, instead(memoryFile, func(p string) error { return os.Symlink("/dev/zero", p) }), "found a link"},
		"memory is a FIFO":      {false, instead(memoryFile, func(p string) error { return unix.Mkfifo(p, 0o600) }), "memory: expected a file"},
		"memory cut":            {false, change(memoryFile, cut), "memory: expected 20971520 bytes, found 20971519"},
		"memory changed":        {false, change(memoryFile, flip), "memory: its content is not what was written"},
		"kernel changed":        {false, change(kernelFile, flip), "kernel: its content is not what was written"},
		"kernel cut":            {false, change(kernelFile, cut), "kernel: expected 8 bytes, found 7"},
		"hot changed":           {false, change(hotFile, flip), "hot: its content"},
		"index changed":         {true, change(indexFile, flip), "memory.index: its content"},
		"packed memory cut":     {true, change(packedFile, cut), "memory.index: a frame"},
		"packed memory longer":  {true, change(packedFile, func(b []byte) []byte { return append(b, 1) }), "memory.index: frames of"},
		"packed memory changed": {true, change(packedFile, flip), "memory"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "one")
			from := plain
			if c.packed {
				from = packed
			}
			if err := os.CopyFS(dir, os.DirFS(from)); err != nil {
				t.Fatal(err)
			}
			c.damage(t, dir)
			s, err := Open(dir)
			if err == nil {
				err = errors.Join(s.Verify(t.Context()), s.Close())
			}
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v, expected one line with %q", err, c.want)
			} else if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewer) {
				t.Errorf("%v is neither damaged nor newer", err)
			}
		})
	}
	if _, err := Open(filepath.Join(t.TempDir(), "nowhere")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// FuzzManifest: whatever a manifest has, it is refused, or means the same when it is written
// again.
func FuzzManifest(f *testing.F) {
	dir := filepath.Join(f.TempDir(), "one")
	kept(f, dir, Options{Compress: CompressZstd})
	b, err := os.ReadFile(filepath.Join(dir, manifestFile))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"format":2}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseManifest(b)
		if err != nil {
			return
		}
		again, err := m.encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseManifest(again); err != nil {
			t.Errorf("%v: %s", err, again)
		}
		if m.Memory.Bytes < 1<<20 || len(m.session()) != 16 {
			t.Errorf("%+v", m)
		}
	})
}

// session is that of a manifest.
func (m *Manifest) session() [16]byte { return (&Snapshot{Manifest: *m}).session() }

// FuzzParts: ranges, an index and a frame lead nowhere but into memory.
func FuzzParts(f *testing.F) {
	f.Add(encodeHot([]Range{{1, 2}, {5, 1}}), uint64(testPages), int64(100))
	f.Add(make([]byte, chunkMap+mempage.Size), uint64(3), int64(0))
	f.Fuzz(func(t *testing.T, b []byte, pages uint64, packed int64) {
		if list, err := parseHot(b, pages); err == nil {
			next := uint64(0)
			for _, r := range list {
				if r.First < next || r.First+r.Pages > pages || r.Pages == 0 {
					t.Fatalf("%v of %d pages", list, pages)
				}
				next = r.First + r.Pages
			}
		}
		size := min(pages, 1<<20) * mempage.Size
		if ends, err := parseIndex(b, size, packed); err == nil {
			last := int64(0)
			for _, end := range ends {
				if end < last || end-last > maxFrame || end > packed {
					t.Fatalf("%v of %d bytes", ends, packed)
				}
				last = end
			}
		}
		chunk := make([]byte, min(size, packChunk))
		_ = unpackInto(chunk, b)
	})
}

// Ranges have every bit, and are few.
func TestHotRanges(t *testing.T) {
	const pages = 1 << 22
	r := rand.New(rand.NewPCG(3, 4))
	hot := mempage.NewBitmap(pages)
	for range 200_000 {
		hot.Set(r.Uint64N(pages))
	}
	list, err := parseHot(encodeHot(hotRanges(hot)), pages)
	if err != nil || len(list) > maxHot {
		t.Fatalf("%d ranges, %v", len(list), err)
	}
	for _, x := range list {
		hot.ClearRange(x.First, x.Pages)
	}
	if n := hot.Count(); n != 0 {
		t.Errorf("%d pages are in no range", n)
	}
}
