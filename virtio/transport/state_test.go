package transport_test

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/transport"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// save pauses and saves.
func (g *guest) save() transport.State {
	g.t.Helper()
	check(g.t, g.device.Pause(context.Background()))
	s, err := g.device.SaveState()
	check(g.t, err)
	return s
}

// dst is another machine with the same memory, in the state of this one.
func (g *guest) dst() *guest {
	g.t.Helper()
	s := g.save()
	h := newGuestWith(g.t, g.mem)
	check(g.t, h.device.LoadState(s))
	again, err := h.device.SaveState()
	if check(g.t, err); !reflect.DeepEqual(s, again) {
		g.t.Fatalf("saved %+v, loaded, saved %+v", s, again)
	}
	return h
}

// A device moves several times, with requests that are not answered yet, and with
// a notification and an interrupt that are only in an eventfd.
func TestMove(t *testing.T) {
	for _, features := range []uint64{virtio.FeatureVersion1, virtio.FeatureVersion1 | virtio.FeatureEventIdx, allFeatures &^ virtio.FeatureEventIdx, allFeatures} {
		t.Run(fmt.Sprintf("features %#x", features), func(t *testing.T) {
			g := newGuest(t)
			d := g.start(features)
			g.write(device, 4, 77)
			for n := range 12 {
				g.echoed(d[1], 1, fmt.Sprintf("request %d", n), g.interrupted(1))
				text := fmt.Sprintf("under way %d", n)
				switch n % 3 {
				case 0: // never notified: the kick was lost with an eventfd
					check(t, g.device.Pause(context.Background()))
					g.request(d[0], 0, text)
				case 1: // served, and the interrupt was lost with an eventfd
					g.request(d[0], 0, text)
					g.kick(0)
					g.board.interrupt(t, 0x41)
				case 2: // pause and go on here
					g.request(d[0], 0, text)
					check(t, g.device.Pause(context.Background()))
					check(t, g.device.Resume())
					g.answered(d[0], 0, text, g.interrupted(0))
					continue
				}
				check(t, g.device.Pause(context.Background()))
				before := g.mem.Snapshot()
				h := g.dst()
				if string(g.mem.Snapshot()) != string(before) {
					t.Fatal("guest memory was written by loading")
				}
				check(t, h.device.Resume())
				h.answered(d[0], 0, text, h.interrupted(0))
				h.board.interrupt(t, 0x40)
				if h.read(device, 4) != 77 || h.status() != 15 {
					t.Error("configuration or status")
				}
				g = h
			}
		})
	}
}

// A device that was saved can go on here: the migration was cancelled.
func TestCancelled(t *testing.T) {
	g := newGuest(t)
	d := g.start(allFeatures)
	g.request(d[0], 0, "it stays")
	g.save()
	g.board.taken(0x40)
	g.echo.Set(5)
	if n := g.board.taken(0x40); n != 0 {
		t.Errorf("%d interrupts of a saved device", n)
	}
	check(t, g.device.Resume())
	g.answered(d[0], 0, "it stays", g.interrupted(0))
	g.board.interrupt(t, 0x40)
	g.echoed(d[1], 1, "and goes on", g.interrupted(1))
}

func TestSaveNeedsPause(t *testing.T) {
	g := newGuest(t)
	if _, err := g.device.SaveState(); !errors.Is(err, transport.ErrNotPaused) {
		t.Errorf("saved: %v", err)
	}
	g.negotiate(allFeatures)
	s := g.save()
	if err := g.device.LoadState(s); !errors.Is(err, transport.ErrUsed) {
		t.Errorf("loaded into a device in use: %v", err)
	}
	check(t, g.device.Resume())
	check(t, g.device.Resume())
}

func TestLoadRefuses(t *testing.T) {
	g := newGuest(t)
	g.start(allFeatures)
	for name, tt := range map[string]struct {
		change func(s *transport.State)
		text   string
	}{
		"type":         {func(s *transport.State) { s.Type = 2 }, "found type 2"},
		"queues":       {func(s *transport.State) { s.Queues = s.Queues[:1] }, "found 1"},
		"status":       {func(s *transport.State) { s.Status = 16 }, "status 0x10"},
		"features":     {func(s *transport.State) { s.DriverFeatures |= 1 << 60 }, "0x1000000000000000"},
		"active":       {func(s *transport.State) { s.Status = 3 }, "active"},
		"enabled":      {func(s *transport.State) { s.Queues[1].Queue.Enabled = false }, "queue 1"},
		"ring":         {func(s *transport.State) { s.Queues[0].Queue.Desc = 1 << 50 }, "not RAM"},
		"size":         {func(s *transport.State) { s.Queues[0].Queue.Size = 4096 }, "got 4096"},
		"place":        {func(s *transport.State) { s.Queues[1].Queue.NextUsed = 60000 }, "60000"},
		"config space": {func(s *transport.State) { s.Function.Config = nil }, "expected a configuration space of 256 bytes, found 0"},
		"device":       {func(s *transport.State) { s.Device = nil }, "echo state"},
	} {
		s := g.save()
		s.Queues = append([]transport.QueueState(nil), s.Queues...)
		tt.change(&s)
		h := newGuestWith(t, g.mem)
		if err := h.device.LoadState(s); err == nil || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: %v, want %q", name, err, tt.text)
		}
	}
}

// FuzzRegisters does with the registers whatever it likes: no panic, no hang,
// and at any time a state that loads and is the same, and a device that then
// works as the other does.
func FuzzRegisters(f *testing.F) {
	up := []byte{}
	for _, op := range [][3]byte{{20, 0, 1}, {20, 0, 3}, {8, 2, 1}, {12, 2, 5}, {20, 0, 11}, {22, 1, 0}, {26, 1, 1}, {33, 5, 0}, {28, 1, 1}, {20, 0, 15}} {
		up = append(up, op[0], op[1], op[2], 0)
	}
	f.Add(up)
	f.Add(append(up, 0, 6, 0, 0, 58, 1, 1, 0, 0, 7, 0, 0, 20, 0, 0, 0))
	mem := virtiotest.NewMemory(f, ramBase, 1<<20)
	f.Fuzz(func(t *testing.T, ops []byte) {
		all, err := mem.Slice(ramBase, 1<<20)
		check(t, err)
		clear(all)
		g := newGuestWith(t, mem)
		for ; len(ops) >= 4; ops = ops[4:] {
			off, v := uint64(ops[0]), uint64(ops[2])|uint64(ops[3])<<8
			switch ops[1] % 9 {
			case 0, 1, 2, 3:
				g.write(common+off, 1<<(ops[1]%9), v)
			case 4:
				g.write(device+off, 2, v)
				g.read(device+off, 8)
			case 5: // addresses that are RAM, for the queue that is selected
				for i := range uint64(3) {
					g.write(common+32+8*i, 4, ramBase+(v&0xff)<<12+i<<10)
				}
			case 6:
				g.write(notify+off, 2, v)
				g.read(isr, 1)
			case 7:
				check(t, mem.WriteAt([]byte{byte(v), byte(v >> 8)}, ramBase+off<<8+v%4))
			case 8:
				g.write(table+off, 4, v)
				g.setConfig(0x42, 2, uint32(v))
			}
			g.read(common+off, 1<<(ops[1]%4))
		}
		g.dst().mustResume()
	})
}

// mustResume starts a loaded device. That a device cannot go on is no fault of
// the state: the driver learns it.
func (g *guest) mustResume() {
	g.t.Helper()
	check(g.t, g.device.Resume())
	g.write(common+20, 1, 0)
	if g.status() != 0 {
		g.t.Fatalf("status %#x after a reset", g.status())
	}
}
