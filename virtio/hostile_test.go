package virtio_test

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/virtio"
)

// hostile is a queue of 8 descriptors whose ring a test writes by hand.
type hostile struct {
	*rig
	desc, avail []byte
	ram         uint64 // a page of RAM
	table       uint64 // another one
}

func newHostile(t testing.TB, features uint64) *hostile {
	h := &hostile{rig: newRig(t, 8, features)}
	s := h.driver.State()
	h.desc = h.driver.Bytes(s.Desc, 8*16)
	h.avail = h.driver.Bytes(s.Driver, 4+2*8)
	h.ram = h.buffers()
	h.table = h.ram + mempage.Size
	return h
}

func put(b []byte, i int, addr uint64, n uint32, lo, hi uint16) {
	binary.LittleEndian.PutUint64(b[i*16:], addr)
	binary.LittleEndian.PutUint32(b[i*16+8:], n)
	binary.LittleEndian.PutUint16(b[i*16+12:], lo)
	binary.LittleEndian.PutUint16(b[i*16+14:], hi)
}

const (
	next     = 1
	write    = 2
	indirect = 4
	avail    = 1 << 7 // packed, first round
)

// wantBroken checks that the queue says what is wrong, stays broken, and has
// nothing out.
func (h *hostile) wantBroken(t *testing.T, text string) {
	t.Helper()
	var c virtio.Chain
	for range 2 {
		ok, err := h.queue.Next(&c)
		if ok || !errors.Is(err, virtio.ErrRing) || !strings.Contains(err.Error(), text) {
			t.Fatalf("Next: %v, %v; want an error with %q", ok, err, text)
		}
	}
	if _, err := h.queue.SaveState(); err != nil {
		t.Error(err)
	}
}

func TestHostileSplit(t *testing.T) {
	const end = ^uint64(0)
	for _, tt := range []struct {
		name  string
		setup func(h *hostile)
		text  string
	}{
		{"index", func(h *hostile) { binary.LittleEndian.PutUint16(h.avail[2:], 9) }, "went on by 9"},
		{"head", func(h *hostile) { h.avail[4] = 8 }, "descriptor 8 of 8"},
		{"next", func(h *hostile) { put(h.desc, 0, h.ram, 1, next, 8) }, "descriptor 8 of 8"},
		{"loop", func(h *hostile) { put(h.desc, 0, h.ram, 1, next, 0) }, "more than 8"},
		{"longer loop", func(h *hostile) { put(h.desc, 0, h.ram, 1, next, 1); put(h.desc, 1, h.ram, 1, next, 0) }, "more than 8"},
		{"not RAM", func(h *hostile) { put(h.desc, 0, 0x1000, 1, 0, 0) }, "not RAM"},
		{"over the end", func(h *hostile) { put(h.desc, 0, ramBase+h.mem.Size()-1, 2, 0, 0) }, "not RAM"},
		{"around the end", func(h *hostile) { put(h.desc, 0, end, 2, write, 0) }, "not RAM"},
		{"4 GiB", func(h *hostile) {
			put(h.desc, 0, h.ram, 1, next, 1)
			put(h.desc, 1, h.ram, 1<<32-1, 0, 0)
		}, "4 GiB"},
		{"order", func(h *hostile) { put(h.desc, 0, h.ram, 1, next|write, 1); put(h.desc, 1, h.ram, 1, 0, 0) }, "after a writable"},
		{"indirect and next", func(h *hostile) { put(h.desc, 0, h.table, 16, indirect|next, 1) }, "has a next"},
		{"empty table", func(h *hostile) { put(h.desc, 0, h.table, 0, indirect, 0) }, "table of 0 bytes"},
		{"crooked table", func(h *hostile) { put(h.desc, 0, h.table, 24, indirect, 0) }, "table of 24 bytes"},
		{"table not RAM", func(h *hostile) { put(h.desc, 0, 0, 16, indirect, 0) }, "not RAM"},
		{"table in a table", func(h *hostile) {
			put(h.desc, 0, h.table, 16, indirect, 0)
			put(h.driver.Bytes(h.table, 16), 0, h.table, 16, indirect, 0)
		}, "is indirect"},
		{"next in a table", func(h *hostile) {
			put(h.desc, 0, h.table, 16, indirect, 0)
			put(h.driver.Bytes(h.table, 16), 0, h.ram, 1, next, 1)
		}, "descriptor 1 of an indirect table of 1"},
		{"loop in a table", func(h *hostile) {
			put(h.desc, 0, h.table, 32, indirect, 0)
			put(h.driver.Bytes(h.table, 32), 0, h.ram, 1, next, 1)
			put(h.driver.Bytes(h.table, 32), 1, h.ram, 1, next, 0)
		}, "more than 1024"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHostile(t, layouts[0].features)
			binary.LittleEndian.PutUint16(h.avail[2:], 1)
			tt.setup(h)
			h.wantBroken(t, tt.text)
		})
	}
	h := newHostile(t, virtio.FeatureVersion1)
	binary.LittleEndian.PutUint16(h.avail[2:], 1)
	put(h.desc, 0, h.table, 16, indirect, 0)
	h.wantBroken(t, "not negotiated")

	// The same heads again and again, never given back.
	h = newHostile(t, layouts[0].features)
	put(h.desc, 0, h.ram, 1, 0, 0)
	binary.LittleEndian.PutUint16(h.avail[2:], 8)
	for range 8 {
		if !h.next(new(virtio.Chain)) {
			t.Fatal("nothing there")
		}
	}
	binary.LittleEndian.PutUint16(h.avail[2:], 9)
	if _, err := h.queue.Next(new(virtio.Chain)); err == nil || !strings.Contains(err.Error(), "in flight") {
		t.Errorf("a ninth of 8 descriptors: %v", err)
	}
}

func TestHostilePacked(t *testing.T) {
	for _, tt := range []struct {
		name  string
		setup func(h *hostile)
		text  string
	}{
		{"no end", func(h *hostile) {
			for i := range 8 {
				put(h.desc, i, h.ram, 1, 0, avail|next)
			}
		}, "more than 8"},
		{"not RAM", func(h *hostile) { put(h.desc, 0, 0x1000, 1, 0, avail) }, "not RAM"},
		{"order", func(h *hostile) { put(h.desc, 0, h.ram, 1, 0, avail|next|write); put(h.desc, 1, h.ram, 1, 0, avail) }, "after a writable"},
		{"indirect and next", func(h *hostile) { put(h.desc, 0, h.table, 16, 0, avail|indirect|next) }, "in a list"},
		{"indirect at the end", func(h *hostile) {
			put(h.desc, 0, h.ram, 1, 0, avail|next)
			put(h.desc, 1, h.table, 16, 0, avail|indirect)
		}, "in a list"},
		{"crooked table", func(h *hostile) { put(h.desc, 0, h.table, 17, 0, avail|indirect) }, "table of 17 bytes"},
		{"long table", func(h *hostile) { put(h.desc, 0, ramBase, 1025*16, 0, avail|indirect) }, "more than 1024"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHostile(t, layouts[2].features)
			tt.setup(h)
			h.wantBroken(t, tt.text)
		})
	}
	h := newHostile(t, virtio.FeatureVersion1|virtio.FeatureRingPacked)
	put(h.desc, 0, h.table, 16, 0, avail|indirect)
	h.wantBroken(t, "not negotiated")

	// A driver that offers what the device has not given back.
	h = newHostile(t, layouts[2].features)
	for i := range 8 {
		put(h.desc, i, h.ram, 1, uint16(i), avail)
	}
	for range 8 {
		if !h.next(new(virtio.Chain)) {
			t.Fatal("nothing there")
		}
	}
	put(h.desc, 0, h.ram, 1, 0, 1<<15) // available in the second round
	if _, err := h.queue.Next(new(virtio.Chain)); err == nil || !strings.Contains(err.Error(), "in flight") {
		t.Errorf("a ninth of 8 descriptors: %v", err)
	}
}

// A queue is not started where its rings cannot be.
func TestStartRefuses(t *testing.T) {
	eachLayout(t, func(t *testing.T, features uint64) {
		r := newRig(t, 8, features)
		good := r.driver.State()
		for name, change := range map[string]func(s *virtio.QueueState){
			"no size":             func(s *virtio.QueueState) { s.Size = 0 },
			"large":               func(s *virtio.QueueState) { s.Size = virtio.MaxQueueSize + 1 },
			"crooked descriptors": func(s *virtio.QueueState) { s.Desc += 8 },
			"crooked driver":      func(s *virtio.QueueState) { s.Driver++ },
			"crooked device":      func(s *virtio.QueueState) { s.Device += 2 },
			"descriptors":         func(s *virtio.QueueState) { s.Desc = ramBase - 16 },
			"driver":              func(s *virtio.QueueState) { s.Driver = ramBase + r.mem.Size() },
			"device":              func(s *virtio.QueueState) { s.Device = 1<<64 - 4 },
		} {
			s := good
			change(&s)
			q := r.newQueue()
			if err := q.Start(s, features); !errors.Is(err, virtio.ErrRing) {
				t.Errorf("%s: started with %v", name, err)
			}
			if _, err := q.Next(new(virtio.Chain)); err != nil || q.Size() != 0 {
				t.Errorf("%s: not started, and Next says %v", name, err)
			}
		}
		s := good
		if s.Size = 6; features&virtio.FeatureRingPacked == 0 {
			if err := r.newQueue().Start(s, features); err == nil {
				t.Error("a split queue of 6")
			}
		} else {
			check(t, r.newQueue().Start(s, features))
			s.NextAvail = 6
			if err := r.newQueue().Start(s, features); err == nil {
				t.Error("place 6 in a ring of 6")
			}
		}
		if err := r.queue.Start(good, features); err == nil {
			t.Error("started twice")
		}
	})
}
