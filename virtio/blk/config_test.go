package blk

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/virtio/limit"
	"pgregory.net/rapid"
)

func TestParseConfig(t *testing.T) {
	for option, wanted := range map[string]Config{
		"root.img":                          {Path: "root.img"},
		"path=a=b":                          {Path: "a=b"},
		"path=a,,b.img,id=x":                {Path: "a,b.img", ID: "x"},
		"readonly,path=/x":                  {Path: "/x", ReadOnly: true},
		"path=/x,readonly,direct=on":        {Path: "/x", ReadOnly: true, Direct: true},
		"path=/x,readonly=off,queues=4":     {Path: "/x", Queues: 4},
		"root.img,direct,id=d 1,format=raw": {Path: "root.img", Direct: true, ID: "d 1", Raw: true},
		"path=/x,bps=10M,iops=500":          {Path: "/x", Limit: limit.Rates{BPS: 10 << 20, IOPS: 500}},
	} {
		c, err := ParseConfig(option)
		if err != nil || c != wanted {
			t.Errorf("%s: %+v, %v", option, c, err)
		}
	}
	for option, says := range map[string]string{
		"":                                 "path=PATH is missing",
		"readonly":                         "path=PATH is missing",
		"path=":                            "path=PATH is missing",
		"path=/x,cache=none":               `"cache" is unknown`,
		"path=/x,y.img":                    "written twice",
		"path=/x,queues=0":                 "between 1 and 32",
		"path=/x,queues=many":              "between 1 and 32",
		"path=/x,readonly=maybe":           "neither on nor off",
		"path=/x,id=123456789012345678901": "got 21",
		"path=/x,id=ü":                     "printable ASCII",
		"path=/x,path=/y":                  "path is given twice",
		"path=/x,bps=0":                    "bps=0: expected",
		"path=/x,iops=some":                "iops=some: expected",
		"path=/x,bps-burst=1M":             "needs bps=",
		"path=/x,bps=1,bps=2":              "bps is given twice",
		"path=/x,format=qcow2":             "never written",
	} {
		if _, err := ParseConfig(option); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", option, err)
		}
	}
}

func TestConfigString(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := Config{
			Path:     rapid.StringMatching(`[a-z,=/]{1,12}`).Draw(t, "path"),
			ReadOnly: rapid.Bool().Draw(t, "readonly"),
			Direct:   rapid.Bool().Draw(t, "direct"),
			ID:       rapid.StringMatching(`[ -~]{0,20}`).Draw(t, "id"),
			Queues:   rapid.IntRange(0, MaxQueues).Draw(t, "queues"),
			Raw:      rapid.Bool().Draw(t, "raw"),
			Limit:    limit.Rates{BPS: rapid.Uint64Range(0, 1<<50).Draw(t, "bps"), IOPS: rapid.Uint64Range(0, 1<<50).Draw(t, "iops")},
		}
		again, err := ParseConfig(c.String())
		if err != nil || again != c {
			t.Fatalf("%+v, %s: %+v, %v", c, c, again, err)
		}
	})
}

// The configuration structure is the one of section 5.2.4, at any offset.
func TestReadConfig(t *testing.T) {
	d := open(t, Config{Path: newImage(t, 4<<20), Queues: 3})
	b := make([]byte, 72)
	d.ReadConfig(0, b)
	le := binary.LittleEndian
	if le.Uint64(b) != 8192 || le.Uint32(b[12:]) != 254 || le.Uint16(b[16:]) != 8 || b[18] != 16 || b[19] != 63 ||
		le.Uint32(b[20:]) != 512 || b[32] != 1 || le.Uint16(b[34:]) != 3 || le.Uint32(b[36:]) != maxDiscardSectors ||
		le.Uint32(b[48:]) != maxZeroSectors || b[56] != 1 || le.Uint32(b[60:]) != 0 {
		t.Fatalf("% x", b)
	}
	for off := range uint32(80) {
		for n := range 9 {
			p := make([]byte, n)
			d.ReadConfig(off, p)
			for i := range p {
				if at := int(off) + i; at < len(b) && p[i] != b[at] || at >= len(b) && p[i] != 0 {
					t.Fatalf("offset %d, %d bytes: % x", off, n, p)
				}
			}
		}
	}
	d.ReadConfig(1<<32-1, make([]byte, 8))
}

// The driver may turn the write cache off, and nothing else.
func TestWriteback(t *testing.T) {
	d := open(t, Config{Path: newImage(t, 64<<10)})
	r := newRig(t, d, layouts["split"])
	for off := range uint32(64) {
		if off != offWriteback {
			d.WriteConfig(off, []byte{0})
		}
	}
	if !d.caches() {
		t.Fatal("the cache is off")
	}
	d.WriteConfig(offWriteback, []byte{0})
	if d.caches() {
		t.Fatal("the cache is on")
	}
	status, _ := r.do(typeOut, 0, 512, false)
	want(t, "durable write", status, statusOK)
	r.putRange(0, 1, 3, 0)
	status, _ = r.do(typeWriteZeroes, 0, rangeSize, false)
	want(t, "durable write of zeros", status, statusOK)
	d.WriteConfig(offWriteback-2, []byte{9, 9, 1, 9})
	if !d.caches() {
		t.Fatal("the cache is off")
	}
	// A driver that never heard of flushes (5.2.6.2).
	d.Reset()
	d.features = 0
	if d.caches() {
		t.Fatal("writes wait for a flush that will not come")
	}
}

func TestState(t *testing.T) {
	d := open(t, Config{Path: newImage(t, 64<<10)})
	rapid.Check(t, func(rt *rapid.T) {
		s := State{128, Topology{
			BlockSize:    512 << rapid.IntRange(0, 3).Draw(rt, "block"),
			PhysicalExp:  rapid.Uint8Range(0, 20).Draw(rt, "physical"),
			MinIO:        rapid.Uint16().Draw(rt, "min"),
			OptIO:        rapid.Uint32().Draw(rt, "opt"),
			DiscardAlign: rapid.Uint32().Draw(rt, "align"),
		}, rapid.Bool().Draw(rt, "writeback")}
		b, err := strictcbor.Marshal(s)
		if err != nil {
			rt.Fatal(err)
		}
		if err := d.LoadState(b); err != nil {
			rt.Fatal(err)
		}
		again, err := d.SaveState()
		if err != nil || !bytes.Equal(again, b) {
			rt.Fatalf("%x, then %x, %v", b, again, err)
		}
	})
	before, err := d.SaveState()
	if err != nil {
		t.Fatal(err)
	}
	for says, s := range map[string]State{
		"65024 bytes at the source, 65536": {127, Topology{BlockSize: 512}, true},
		"blocks of 0 bytes":                {128, Topology{}, true},
		"blocks of 8192 bytes":             {128, Topology{BlockSize: 8192}, true},
		"2^21 blocks":                      {128, Topology{BlockSize: 512, PhysicalExp: 21}, true},
	} {
		b, err := strictcbor.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.LoadState(b); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("want %s: %v", says, err)
		}
	}
	for _, b := range [][]byte{nil, {0xff}, []byte("hello"), before[:len(before)-1], append(bytes.Clone(before), 0)} {
		if err := d.LoadState(b); err == nil {
			t.Errorf("% x was loaded", b)
		}
	}
	if after, err := d.SaveState(); err != nil || !bytes.Equal(after, before) {
		t.Errorf("a state that was refused changed the device: %v", err)
	}
}
