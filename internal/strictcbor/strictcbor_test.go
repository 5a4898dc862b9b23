package strictcbor_test

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/strictcbor"
)

type inner struct {
	List []uint32          `cbor:"list"`
	Map  map[string]uint16 `cbor:"map"`
	Text string            `cbor:"text"`
}

type nested []nested

type state struct {
	Version uint32   `cbor:"version"`
	Bytes   []byte   `cbor:"bytes"`
	Array   [3]uint8 `cbor:"array"`
	Inner   []inner  `cbor:"inner"`
	Later   uint64   `cbor:"later,omitzero"`
}

var sample = state{
	Version: 3, Bytes: []byte{1, 2}, Array: [3]uint8{7, 8, 9},
	Inner: []inner{{List: []uint32{1 << 31}, Map: map[string]uint16{"b": 1, "a": 2}, Text: "x"}},
}

func Example() {
	type disk struct {
		Sectors uint64 `cbor:"sectors"`
	}
	b, err := strictcbor.Marshal(disk{Sectors: 4096})
	if err != nil {
		panic(err)
	}
	var d disk
	fmt.Println(strictcbor.Unmarshal(b, &d), d.Sectors)
	// Output: <nil> 4096
}

func TestRoundTrip(t *testing.T) {
	b, err := strictcbor.Marshal(sample)
	if err != nil {
		t.Fatal(err)
	}
	for range 20 { // the order of a map's keys does not vary
		if again, err := strictcbor.Marshal(sample); err != nil || !bytes.Equal(again, b) {
			t.Fatalf("another encoding of the same value (%v):\n%x\n%x", err, again, b)
		}
	}
	var got state
	if err := strictcbor.Unmarshal(b, &got); err != nil || !reflect.DeepEqual(got, sample) {
		t.Errorf("decoded %+v, %v; expected %+v", got, err, sample)
	}
	if bytes.Contains(b, []byte("later")) {
		t.Errorf("a zero field with omitzero is in %x", b)
	}
}

// A peer that is one version ahead: its version can be read, the rest is
// refused.
func TestUnknownField(t *testing.T) {
	b, err := strictcbor.Marshal(map[string]any{"version": 4, "sockets": 2})
	if err != nil {
		t.Fatal(err)
	}
	var got state
	if err := strictcbor.UnmarshalKnown(b, &got); err != nil || got.Version != 4 {
		t.Errorf("UnmarshalKnown: version %d, %v", got.Version, err)
	}
	if err := strictcbor.Unmarshal(b, &got); err == nil {
		t.Error("Unmarshal took an unknown field")
	}
}

// Both ways of decoding refuse what is malformed, ambiguous or too large.
func TestRefuses(t *testing.T) {
	version := "67" + hex.EncodeToString([]byte("version"))
	text := "64" + hex.EncodeToString([]byte("text"))
	long := func(header string, n int, item string) string { return header + strings.Repeat(item, n) }
	for _, c := range []struct {
		name, hex string
		into      any
	}{
		{"empty input", "", new(state)},
		{"truncated", "a1" + version, new(state)},
		{"duplicate key", "a2" + version + "01" + version + "02", new(state)},
		{"map of indefinite length", "bf" + version + "01ff", new(state)},
		{"tag", "c1a1" + version + "01", new(state)},
		{"tagged value", "a1" + version + "c101", new(state)},
		{"invalid UTF-8", "a1" + text + "61ff", new(inner)},
		{"data after the item", "a1" + version + "0100", new(state)},
		{"value out of range", "a1" + version + "1b0000000100000000", new(state)},
		{"wrong type", "a1" + version + "6131", new(state)},
		{"4097 elements", long("991001", 4097, "00"), new([]uint32)},
		{"an array that says 2^32 elements", "9b0000000100000000", new([]uint32)},
		{"65 pairs", func() string {
			s := "b841"
			for i := range 65 {
				s += fmt.Sprintf("18%02x00", 100+i)
			}
			return s
		}(), new(map[uint32]uint32)},
		{"13 levels", strings.Repeat("81", 12) + "80", new(nested)},
	} {
		b, err := hex.DecodeString(c.hex)
		if err != nil {
			t.Fatal(err)
		}
		if err := strictcbor.Unmarshal(b, c.into); err == nil {
			t.Errorf("%s: Unmarshal took it", c.name)
		}
		if err := strictcbor.UnmarshalKnown(b, c.into); err == nil {
			t.Errorf("%s: UnmarshalKnown took it", c.name)
		}
	}
}

// The case of a field's name matters: "VERSION" is unknown.
func TestCaseMatters(t *testing.T) {
	b, err := strictcbor.Marshal(map[string]any{"VERSION": 4})
	if err != nil {
		t.Fatal(err)
	}
	var got state
	if err := strictcbor.Unmarshal(b, &got); err == nil || got.Version != 0 {
		t.Errorf("version %d, %v", got.Version, err)
	}
}

// The limits themselves are allowed.
func TestLimits(t *testing.T) {
	full := make([]uint32, 4096)
	pairs := map[uint32]uint32{}
	for i := range uint32(64) {
		pairs[i] = i
	}
	deep := nested{}
	for range 11 {
		deep = nested{deep}
	}
	for _, v := range []any{&full, &pairs, &deep} {
		b, err := strictcbor.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		got := reflect.New(reflect.TypeOf(v).Elem())
		if err := strictcbor.Unmarshal(b, got.Interface()); err != nil {
			t.Errorf("%T: %v", v, err)
		}
	}
}

// What is decoded can be encoded and decodes to the same value again.
func FuzzUnmarshal(f *testing.F) {
	b, err := strictcbor.Marshal(sample)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(bytes.Replace(b, []byte("array"), []byte("arras"), 1))
	f.Add([]byte{0xa0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var got, known, again state
		if strictcbor.Unmarshal(b, &got) != nil {
			return
		}
		if err := strictcbor.UnmarshalKnown(b, &known); err != nil || !reflect.DeepEqual(known, got) {
			t.Fatalf("UnmarshalKnown: %+v, %v; Unmarshal: %+v", known, err, got)
		}
		b, err := strictcbor.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		if err := strictcbor.Unmarshal(b, &again); err != nil || !reflect.DeepEqual(again, got) {
			t.Fatalf("decoded %+v, then %+v, %v", got, again, err)
		}
	})
}
