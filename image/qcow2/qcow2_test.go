package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// The parts of the images of these tests, in clusters of testCluster bytes: header, first
// table, second table, data, compressed data.
const (
	testBits    = 9
	testCluster = 1 << testBits
	atL1        = 1 * testCluster
	atL2        = 2 * testCluster
	atData      = 3 * testCluster
	atPacked    = 4 * testCluster
	testClust   = 6 // of the disk: data, compressed, zeros, none, none, none
)

var be = binary.BigEndian

// testImage is an image of version 3 with a cluster of each kind.
func testImage(compression byte) []byte {
	b := make([]byte, 6*testCluster)
	copy(b, Magic)
	be.PutUint32(b[4:], 3)
	be.PutUint32(b[20:], testBits)
	be.PutUint64(b[24:], testClust*testCluster)
	be.PutUint32(b[36:], 1)
	be.PutUint64(b[40:], atL1)
	be.PutUint32(b[96:], 4)
	be.PutUint32(b[100:], 112)
	if b[104] = compression; compression > 0 {
		be.PutUint64(b[72:], featureCompression)
	}
	be.PutUint64(b[atL1:], atL2|1<<63)
	be.PutUint64(b[atL2:], atData|1<<63)
	packed := pack(compression, bytes.Repeat([]byte("packed! "), testCluster/8))
	copy(b[atPacked:], packed)
	be.PutUint64(b[atL2+8:], flagCompressed|uint64((len(packed)-1)/512)<<(62-(testBits-8))|atPacked)
	be.PutUint64(b[atL2+16:], flagZero)
	copy(b[atData:], bytes.Repeat([]byte("plain. "), testCluster/7+1)[:testCluster])
	return b
}

func pack(compression byte, p []byte) []byte {
	var out bytes.Buffer
	if compression > 0 {
		z, _ := zstd.NewWriter(nil)
		return z.EncodeAll(p, nil)
	}
	w, _ := flate.NewWriter(&out, 6)
	_, _ = w.Write(p)
	_ = w.Close()
	return out.Bytes()
}

func open(b []byte, backing Source) (*Image, error) {
	return New(bytes.NewReader(b), int64(len(b)), backing)
}

// readAll reads the whole disk.
func readAll(b []byte, backing Source) ([]byte, error) {
	im, err := open(b, backing)
	if err != nil {
		return nil, err
	}
	if _, err := im.Check(context.Background()); err != nil {
		return nil, err
	}
	p := make([]byte, im.Size())
	n, err := im.ReadAt(p, 0)
	return p[:n], err
}

func TestKindsOfClusters(t *testing.T) {
	for compression, name := range []string{"zlib", "zstd"} {
		b := testImage(byte(compression))
		want := make([]byte, testClust*testCluster)
		copy(want, b[atData:atData+testCluster])
		copy(want[testCluster:], bytes.Repeat([]byte("packed! "), testCluster/8))
		got, err := readAll(b, nil)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v; reads %q", name, err, got)
		}
	}
}

// edit is one change to an image.
func put64(off int, v uint64) func([]byte) []byte {
	return func(b []byte) []byte { be.PutUint64(b[off:], v); return b }
}

func put32(off int, v uint32) func([]byte) []byte {
	return func(b []byte) []byte { be.PutUint32(b[off:], v); return b }
}

// extension adds a header extension with text, and features.
func extension(kind uint32, text string, features uint64) func([]byte) []byte {
	return func(b []byte) []byte {
		be.PutUint64(b[72:], features)
		be.PutUint32(b[112:], kind)
		be.PutUint32(b[116:], uint32(len(text)))
		copy(b[120:], text)
		return b
	}
}

// Each rule of the format that an image breaks is found, and said.
func TestRefused(t *testing.T) {
	for _, c := range []struct {
		what string
		edit func([]byte) []byte
		kind error
		want string
	}{
		{"no file", func([]byte) []byte { return nil }, ErrDamaged, "found a file of 0"},
		{"cut header", func(b []byte) []byte { return b[:71] }, ErrDamaged, "found a file of 71"},
		{"other magic", put32(0, 0x51464900), ErrDamaged, "to begin with"},
		{"version 1", put32(4, 1), ErrRefused, "expected version 2 or 3, found 1"},
		{"version 4", put32(4, 4), ErrRefused, "found 4"},
		{"clusters of 256", put32(20, 8), ErrDamaged, "found 2^8"},
		{"clusters of 4M", put32(20, 22), ErrDamaged, "found 2^22"},
		{"AES", put32(32, 1), ErrRefused, "encrypted"},
		{"LUKS", put32(32, 2), ErrRefused, "encrypted"},
		{"LUKS's header", extension(extEncryption, "0123456789abcdef", 0), ErrRefused, "encrypted"},
		{"corrupt", put64(72, featureCorrupt), ErrRefused, "marked as corrupt"},
		{"external data", put64(72, featureDataFile), ErrRefused, "external data file"},
		{"unknown feature", put64(72, 1<<40), ErrRefused, "0x10000000000"},
		{"named feature", extension(extFeatureNames, "\x00\x28time travel"+strings.Repeat("\x00", 35), 1<<40), ErrRefused, `"time travel"`},
		{"unknown compression", func(b []byte) []byte { b[104] = 2; return put64(72, featureCompression)(b) }, ErrRefused, "type 2"},
		{"compression without its feature", func(b []byte) []byte { b[104] = 1; return b }, ErrDamaged, "contradict"},
		{"small subclusters", put64(72, featureExtendedL2), ErrDamaged, "subclusters of clusters of 512"},
		{"wide refcounts", put32(96, 7), ErrDamaged, "2^7"},
		{"short header", put32(100, 96), ErrDamaged, "a header of 96"},
		{"odd header", put32(100, 106), ErrDamaged, "a header of 106"},
		{"long header", put32(100, 1024), ErrDamaged, "a header of 1024"},
		{"long extension", func(b []byte) []byte { return put32(116, 1<<31)(extension(extBackingFormat, "raw", 0)(b)) }, ErrDamaged, "header extension"},
		{"backing name far away", func(b []byte) []byte { return put32(16, 10)(put64(8, 1<<40)(b)) }, ErrDamaged, "backing file"},
		{"backing name in the header", func(b []byte) []byte { return put32(16, 10)(put64(8, 8)(b)) }, ErrDamaged, "backing file"},
		{"long backing name", func(b []byte) []byte { return put32(16, 1024)(put64(8, 200)(b)) }, ErrDamaged, "backing file"},
		{"backing file that is not open", func(b []byte) []byte { copy(b[200:], "base.raw"); return put32(16, 8)(put64(8, 200)(b)) }, ErrRefused, `"base.raw"`},
		{"enormous disk", put64(24, 1<<63), ErrDamaged, "a disk of 9223372036854775808"},
		{"disk larger than its table", put64(24, 1<<40), ErrDamaged, "needs a first table of"},
		{"enormous first table", put32(36, 1<<31), ErrDamaged, "a first table of 2147483648"},
		{"first table behind the end", put64(40, 1<<40), ErrDamaged, "not all in the file"},
		{"first table past 2^63", put64(40, 1<<63), ErrDamaged, "not all in the file"},
		{"first table between clusters", put64(40, atL1+8), ErrDamaged, "no cluster's"},
		{"first table nowhere", put64(40, 0), ErrDamaged, "no cluster's"},
		{"reserved bits", put64(atL1, atL2|1), ErrDamaged, "reserved bits"},
		{"second table behind the end", put64(atL1, 1<<40), ErrDamaged, "is the file whole"},
		{"second table is the first", put64(atL1, atL1), ErrDamaged, "used twice"},
		{"second table is the header", func(b []byte) []byte { be.PutUint64(b[atL2:], 0); return put64(atL2+24, atL2)(b) }, ErrDamaged, "used twice"},
		{"data behind the end", put64(atL2, 1<<40), ErrDamaged, "is the file whole"},
		{"data between clusters", func(b []byte) []byte { // bits below 9 are reserved with larger clusters
			b = append(b, make([]byte, 16<<10)...)
			be.PutUint32(b[20:], 10)
			be.PutUint64(b[40:], 4096)
			be.PutUint64(b[4096:], 8192)
			be.PutUint64(b[8192:], 512)
			return b
		}, ErrDamaged, "no cluster's"},
		{"data used twice", put64(atL2+24, atData), ErrDamaged, "used twice"},
		{"data that is a table", put64(atL2+24, atL2), ErrDamaged, "used twice"},
		{"data that is compressed", put64(atL2+24, atPacked), ErrDamaged, "used twice"},
		{"compressed that is data", put64(atL2+24, flagCompressed|atData), ErrDamaged, "used twice"},
		{"compressed behind the end", put64(atL2+24, flagCompressed|1<<40), ErrDamaged, "is the file whole"},
		{"compressed nowhere", put64(atL2+24, flagCompressed), ErrDamaged, "compressed data is at offset 0"},
		{"compressed zeros only", func(b []byte) []byte { clear(b[atPacked:]); return b }, ErrDamaged, "the compressed cluster"},
		{"compressed garbage", func(b []byte) []byte { b[atPacked] ^= 0xff; return b }, ErrDamaged, "the compressed cluster"},
		{"compressed and too short", func(b []byte) []byte { copy(b[atPacked:], pack(0, make([]byte, 511))); return b }, ErrDamaged, "the compressed cluster"},
		{"zeros in version 2", put32(4, 2), ErrDamaged, "version 2"},
		{"cut file", func(b []byte) []byte { return b[:atData] }, ErrDamaged, "is the file whole"},
		{"cut file, second table", func(b []byte) []byte { return b[:atL2] }, ErrDamaged, "is the file whole"},
	} {
		_, err := readAll(c.edit(testImage(0)), nil)
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want one with %q", c.what, err, c.want)
		} else if strings.Contains(err.Error(), "\n") || len(err.Error()) > 300 {
			t.Errorf("%s: the error is no line: %q", c.what, err)
		}
	}
}

// What a file has to say that does not matter to a reader is no error.
func TestHarmless(t *testing.T) {
	want, err := readAll(testImage(0), nil)
	if err != nil {
		t.Fatal(err)
	}
	for what, edit := range map[string]func([]byte) []byte{
		"dirty":             put64(72, featureDirty),
		"lazy refcounts":    put64(80, 1),
		"unknown autoclear": put64(88, 1<<50),
		"unknown extension": extension(0x12345678, "what is this", 0),
		"snapshots":         put32(60, 1<<31),
		"refcounts nowhere": put64(48, 1<<62),
		"larger L1":         put32(36, maxL1),
		"cut last sector":   func(b []byte) []byte { return b[:atPacked+100] },
	} {
		got, err := readAll(edit(testImage(0)), nil)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// Tables that are asked for again and again take no more memory than is allowed.
func TestKeepsLittle(t *testing.T) {
	const tables = 3 * cachedBytes / testCluster
	b := testImage(0)
	be.PutUint64(b[24:], tables*64*testCluster)
	be.PutUint32(b[36:], tables)
	be.PutUint64(b[40:], uint64(len(b)))
	l1 := make([]byte, tables*8)
	first := (len(b) + len(l1) + testCluster - 1) / testCluster * testCluster
	for i := range tables {
		be.PutUint64(l1[i*8:], uint64(first+i*testCluster))
	}
	b = append(b, l1...)
	b = append(b, make([]byte, first-len(b)+tables*testCluster)...)
	im, err := open(b, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(tables) {
		if _, _, err := im.Extent(i * 64 * testCluster); err != nil {
			t.Fatal(err)
		}
	}
	if n := int64(len(im.tables.kept)) * im.tables.piece; n > cachedBytes {
		t.Errorf("%d bytes of tables are kept", n)
	}
}

// An image that says anything is read, or refused; it reads the same in pieces as at once.
func FuzzQcow2(f *testing.F) {
	f.Add(testImage(0), int64(0), uint16(600))
	f.Add(testImage(1), int64(500), uint16(600))
	backed := testImage(0)
	copy(backed[300:], "base")
	f.Add(put32(16, 4)(put64(8, 300)(extension(extBackingFormat, "raw", 0)(backed))), int64(1500), uint16(600))
	extended := append(testImage(0), make([]byte, 1<<17)...)
	be.PutUint32(extended[20:], 14)
	be.PutUint64(extended[72:], featureExtendedL2)
	be.PutUint64(extended[24:], 1<<20)
	be.PutUint64(extended[40:], 1<<14)
	be.PutUint64(extended[1<<14:], 2<<14)
	be.PutUint64(extended[2<<14:], 3<<14)
	be.PutUint64(extended[2<<14+8:], 0x00ff0000_0000ff00)
	f.Add(extended, int64(5000), uint16(9000))
	below := &flat{bytes.Repeat([]byte("below "), 300)}
	f.Fuzz(func(t *testing.T, b []byte, off int64, n uint16) {
		im, err := open(b, below)
		if err != nil {
			return
		}
		_, checkErr := im.Check(context.Background())
		off &= 1<<40 - 1
		whole := make([]byte, n)
		got, err := im.ReadAt(whole, off)
		if got < int(n) && err == nil {
			t.Fatalf("%d bytes of %d without an error", got, n)
		}
		for i := 0; i < got; {
			p := make([]byte, min(1+i%700, got-i))
			if n, err := im.ReadAt(p, off+int64(i)); n != len(p) || !bytes.Equal(p, whole[i:i+n]) {
				t.Fatalf("%d bytes at %d: %d, %v, %q instead of %q", len(p), off+int64(i), n, err, p, whole[i:i+n])
			}
			i += len(p)
		}
		for at, i := int64(0), 0; at < im.Size() && i < 100; i++ {
			n, zeros, err := im.Extent(at)
			if err != nil {
				if checkErr == nil && !im.ExtendedL2 {
					t.Fatalf("the extent at %d: %v, which Check has not found", at, err)
				}
				break
			}
			if n < 1 || n > im.Size()-at {
				t.Fatalf("the extent at %d: %d bytes", at, n)
			}
			p := make([]byte, min(n, 4096))
			if m, err := im.ReadAt(p, at); zeros && (err != nil || m < len(p) || len(bytes.Trim(p, "\x00")) > 0) {
				t.Fatalf("the extent at %d is zeros: %q, %v", at, p, err)
			}
			at += n
		}
	})
}

// flat is a backing image without holes.
type flat struct{ b []byte }

func (f *flat) Size() int64 { return int64(len(f.b)) }

func (f *flat) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(f.b).ReadAt(p, off) }

func (f *flat) Extent(off int64) (int64, bool, error) { return f.Size() - off, false, nil }

var _ io.ReaderAt = (*flat)(nil)
