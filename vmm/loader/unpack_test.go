package loader

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os/exec"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
)

// compressors are the command lines of Linux's scripts/Makefile.lib, with a smaller
// window if the compressor would take long.
var compressors = map[string]string{
	"gzip":     "gzip -n -f -9",
	"xz":       "xz --check=crc32 --x86 --lzma2=dict=32MiB",
	"xz plain": "xz --check=crc32 --lzma2=dict=1MiB",
	"xz many":  "xz --x86 --lzma2=dict=1MiB --block-size=50000 --check=crc64",
	"zstd":     "zstd -19",
	"lz4":      "lz4 -l -9 - -",
	"lzma":     "lzma -6",
	"bzip2":    "bzip2 -9",
}

// pack compresses content like Linux's build, and appends the size.
func pack(t testing.TB, how string, content []byte) []byte {
	t.Helper()
	words := strings.Fields(compressors[how])
	testenv.NeedTools(t, words[0])
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Stdin = bytes.NewReader(content)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", how, err)
	}
	if how != "gzip" {
		out = binary.LittleEndian.AppendUint32(out, uint32(len(content)))
	}
	return out
}

// code returns bytes that look like x86 code to a compressor: many calls and
// jumps, at all distances from each other, with short and long targets.
func code(n int) []byte {
	r := rand.New(rand.NewPCG(1, 2))
	var b []byte
	for len(b) < n {
		for range r.IntN(7) {
			b = append(b, byte(r.Uint32()))
		}
		b = append(b, 0xe8+byte(r.IntN(2)))
		target := r.Uint32() & 0xffffff
		if r.IntN(2) == 0 {
			target = -target
		}
		b = binary.LittleEndian.AppendUint32(b, target)
	}
	return b[:n]
}

// The output of the tools is unpacked to the same bytes in every format.
func TestUnpack(t *testing.T) {
	for how := range compressors {
		for _, content := range [][]byte{code(200_003), []byte("small\xe8\x00"), bytes.Repeat([]byte{0xe8, 0, 0xff, 0xe9}, 50_000)} {
			packed := pack(t, how, content)
			got, err := unpack(packed, 1<<20)
			if err != nil {
				t.Errorf("%s: %v", how, err)
			} else if !bytes.Equal(got, content) {
				t.Errorf("%s: %d bytes came out as %d others", how, len(content), len(got))
			}
		}
	}
}

// A payload that is damaged, or has a wrong size, is an error, and is never unpacked
// to more than the limit.
func TestUnpackDamaged(t *testing.T) {
	content := code(100_000)
	for how := range compressors {
		packed := pack(t, how, content)
		if _, err := unpack(packed, 99_999); err == nil || !strings.Contains(err.Error(), "unpacked size must be at most 99999 bytes") {
			t.Errorf("%s, too large: %v", how, err)
		}
		for _, size := range []uint32{99_999, 100_001, 1 << 31, 0} {
			lie := bytes.Clone(packed)
			binary.LittleEndian.PutUint32(lie[len(lie)-4:], size)
			if _, err := unpack(lie, 1<<32); err == nil {
				t.Errorf("%s: size %d was believed", how, size)
			}
		}
		for _, n := range []int{7, 20, len(packed) / 2, len(packed) - 100} {
			short := append(bytes.Clone(packed[:n]), packed[len(packed)-4:]...)
			if _, err := unpack(short, 1<<20); err == nil {
				t.Errorf("%s cut to %d bytes was unpacked", how, n)
			}
		}
		if how == "xz many" || how == "lz4" {
			continue // the loader does not compute CRC64, and lz4 has no check
		}
		flipped := bytes.Clone(packed)
		flipped[len(flipped)/2] ^= 0x10
		if out, err := unpack(flipped, 1<<20); err == nil && (how != "lzma" || bytes.Equal(out, content)) {
			t.Errorf("%s: a flipped bit went unseen", how)
		}
	}
	for _, unknown := range []string{"", "\x89LZO", "\x7fELF", "BZ"} {
		if _, err := unpack([]byte(unknown), 1<<20); !errors.Is(err, errUnknownCompression) {
			t.Errorf("%q: %v", unknown, err)
		}
	}
}

// Any payload is unpacked or refused, without a crash or more bytes than the limit.
func FuzzUnpack(f *testing.F) {
	for how := range compressors {
		f.Add(pack(f, how, code(300)))
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		out, err := unpack(payload, 1<<20)
		if err == nil && len(out) > 1<<20 {
			t.Errorf("%d bytes", len(out))
		}
	})
}
