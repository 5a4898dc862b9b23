package inflate

import (
	"bytes"
	stdlib "compress/flate"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/klauspost/compress/flate"
)

// samples are outputs of all kinds.
func samples() map[string][]byte {
	r := rand.New(rand.NewPCG(1, 2))
	noise, text, few, far := make([]byte, 64<<10), []byte{}, make([]byte, 64<<10), make([]byte, 64<<10)
	for i := range noise {
		noise[i], few[i] = byte(r.Uint32()), byte(r.IntN(3)*r.IntN(2))
	}
	for len(text) < 64<<10 {
		text = fmt.Appendf(text, "%d bottles of %x on the wall, ", r.IntN(100), r.IntN(1<<20))
	}
	copy(far, noise[:300])
	copy(far[32768:], noise[:300])
	copy(far[60000:], noise[:300])
	skewed := make([]byte, 64<<10)
	for i := range skewed { // codes of all lengths
		for n := r.Uint64(); n&1 == 1; n >>= 1 {
			skewed[i]++
		}
	}
	return map[string][]byte{"zeros": make([]byte, 2<<20), "noise": noise, "text": text, "few": few, "far": far, "skewed": skewed,
		"one": {7}, "short": []byte("abcabcabcabcabcabc"), "pairs": bytes.Repeat([]byte("ab"), 5000), "sevens": bytes.Repeat([]byte("abcdefg"), 900)}
}

func packed(t testing.TB, b []byte, level int) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := stdlib.NewWriter(&out, level)
	if err == nil {
		_, err = w.Write(b)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// What was compressed in any way is what comes out; what follows is not looked at; what is
// cut is an error; and a shorter output is a part of it.
func TestFill(t *testing.T) {
	var d Decoder // the same for all
	for name, want := range samples() {
		for _, level := range []int{stdlib.HuffmanOnly, stdlib.NoCompression, 1, 6, 9} {
			in := packed(t, want, level)
			got := make([]byte, len(want))
			if err := d.Fill(got, append(bytes.Clone(in), "and more"...)); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%s, level %d: %v, or other bytes", name, level, err)
			}
			if err := d.Fill(got, in); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%s, level %d, without more: %v, or other bytes", name, level, err)
			}
			part := make([]byte, len(want)/3)
			if err := d.Fill(part, in); err != nil || !bytes.Equal(part, want[:len(part)]) {
				t.Fatalf("%s, level %d: a part: %v, or other bytes", name, level, err)
			}
			if err := d.Fill(make([]byte, len(want)+1), in); !errors.Is(err, ErrShort) {
				t.Errorf("%s, level %d: one byte more than there is: %v", name, level, err)
			}
			for _, cut := range []int{0, 1, 2, len(in) / 2, len(in) * 9 / 10} {
				if cut < len(in)-8 {
					if err := d.Fill(got, in[:cut]); err == nil {
						t.Errorf("%s, level %d: %d of %d bytes are enough", name, level, cut, len(in))
					}
				}
			}
		}
	}
}

// What no compressor writes.
func TestCorrupt(t *testing.T) {
	var d Decoder
	for name, in := range map[string][]byte{
		"a block of type 3":             {7, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		"a length with another inverse": {1, 5, 0, 0, 0, 1, 2, 3, 4, 5},
		"a distance before the output":  {0x4b, 0x04, 0x12, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
		"codes of which all are 1 bit":  {0x05, 0xe0, 0x49, 0x92, 0x24, 0x49, 0x92, 0x24, 0x49, 0x92, 0x24},
		"nothing":                       {},
	} {
		if err := d.Fill(make([]byte, 1000), in); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrShort) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzFill: whatever the bytes are, the output is what the standard library makes of them,
// and there is one if it finds one.
func FuzzFill(f *testing.F) {
	for _, b := range samples() {
		b = b[:min(len(b), 3000)]
		for _, level := range []int{stdlib.HuffmanOnly, 0, 6} {
			f.Add(packed(f, b, level), len(b))
		}
	}
	var d Decoder
	f.Fuzz(func(t *testing.T, in []byte, n int) {
		got, want := make([]byte, max(0, min(n, 70000))), make([]byte, max(0, min(n, 70000)))
		err := d.Fill(got, in)
		n, other := io.ReadFull(stdlib.NewReader(bytes.NewReader(in)), want)
		if other == nil && len(want) > 0 && err != nil {
			t.Fatalf("%v, where the standard library finds %d bytes", err, len(want))
		}
		if err == nil && !bytes.Equal(got[:n], want[:n]) {
			t.Fatal("other bytes than the standard library finds")
		}
		// That one wants bits for the end of the block with each symbol, and finds the end of
		// the input up to 15 bits early.
		if err == nil && other != nil && !errors.Is(other, io.ErrUnexpectedEOF) {
			t.Fatalf("there are %d bytes, where the standard library finds: %v", len(got), other)
		}
	})
}

func BenchmarkFill(b *testing.B) {
	for name, want := range samples() {
		want = append(want, make([]byte, max(0, 64<<10-len(want)))...)[:64<<10]
		in := packed(b, want, 6)
		got := make([]byte, len(want))
		b.Run(name+"/here", func(b *testing.B) {
			var d Decoder
			b.SetBytes(int64(len(want)))
			for b.Loop() {
				if err := d.Fill(got, in); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(name+"/klauspost", func(b *testing.B) {
			r := flate.NewReader(nil)
			b.SetBytes(int64(len(want)))
			for b.Loop() {
				if err := r.(flate.Resetter).Reset(bytes.NewReader(in), nil); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(r, got); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
