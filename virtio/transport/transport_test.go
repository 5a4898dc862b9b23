package transport_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/transport"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// A driver finds the structures by the capability list alone.
func TestCapabilities(t *testing.T) {
	g := newGuest(t)
	if id := g.config(0, 4); id != 0x107f1af4 {
		t.Errorf("id %#x", id)
	}
	found := map[byte][3]uint32{}
	for at := g.config(0x34, 1); at != 0; at = g.config(int(at)+1, 1) {
		if g.config(int(at), 1) != 9 {
			continue
		}
		c := int(at)
		found[byte(g.config(c+3, 1))] = [3]uint32{g.config(c+4, 1), g.config(c+8, 4), g.config(c+12, 4)}
		switch kind, length := g.config(c+3, 1), g.config(c+2, 1); {
		case kind == 2 && (length != 20 || g.config(c+16, 4) != 4):
			t.Errorf("notify capability of %d bytes, multiplier %d", length, g.config(c+16, 4))
		case kind == 5 && length != 20, kind != 2 && kind != 5 && length != 16:
			t.Errorf("capability %d of %d bytes", kind, length)
		}
	}
	want := map[byte][3]uint32{1: {0, 0, 64}, 2: {0, 0x3000, 0x1000}, 3: {0, 0x1000, 1}, 4: {0, 0x2000, 0x1000}, 5: {0, 0, 0}}
	if fmt.Sprint(found) != fmt.Sprint(want) {
		t.Errorf("capabilities %v, want %v", found, want)
	}
}

func TestNegotiation(t *testing.T) {
	g := newGuest(t)
	var offered uint64
	for i := range uint64(3) {
		g.write(common, 4, i)
		part := g.read(common+4, 4)
		if i == 2 && part != 0 {
			t.Errorf("features from 64 on: %#x", part)
		} else if i < 2 {
			offered |= part << (32 * i)
		}
	}
	if offered != allFeatures {
		t.Errorf("offered %#x, want %#x", offered, uint64(allFeatures))
	}
	if g.read(common+18, 2) != 2 {
		t.Error("number of queues")
	}
	if g.negotiate(allFeatures | 2) {
		t.Error("a feature that was not offered")
	}
	if g.negotiate(1) {
		t.Error("a legacy driver")
	}
	if !g.negotiate(virtio.FeatureVersion1) {
		t.Error("a plain driver was refused")
	}
	g.write(common+8, 4, 0)
	g.write(common+12, 4, 1)
	if g.read(common+12, 4) != 0 {
		t.Error("features change after FEATURES_OK")
	}
	g.write(common+20, 1, 0)
	if g.status() != 0 || g.read(common+12, 4) != 0 {
		t.Error("not reset")
	}
	g.write(common+20, 1, 5) // DRIVER_OK without FEATURES_OK
	if g.status() != 5|64 {
		t.Errorf("status %#x, want DEVICE_NEEDS_RESET", g.status())
	}
	if text := <-g.logs; !strings.Contains(text, "without FEATURES_OK") {
		t.Errorf("logged %q", text)
	}
}

// TestNegotiated: what a driver uses is what it has chosen; while it chooses, it may
// choose any.
func TestNegotiated(t *testing.T) {
	g := newGuest(t)
	if got := g.device.Negotiated(); got != 0 {
		t.Errorf("without a driver: %#x", got)
	}
	g.write(common+20, 1, 3) // ACKNOWLEDGE, DRIVER
	if got := g.device.Negotiated(); got != allFeatures {
		t.Errorf("while it chooses: %#x", got)
	}
	if !g.negotiate(virtio.FeatureVersion1 | virtio.FeatureIndirectDesc) {
		t.Fatal("refused")
	}
	if got := g.device.Negotiated(); got != virtio.FeatureVersion1|virtio.FeatureIndirectDesc {
		t.Errorf("chosen: %#x", got)
	}
}

func TestNewRefuses(t *testing.T) {
	for _, sizes := range [][]uint16{nil, {0}, {3}, {8, 65535}, make([]uint16, 2000)} {
		e := &virtiotest.Echo{Queues: sizes}
		e.WriteConfig(0, []byte{0xff})
		b := newBoard()
		if _, err := transport.New(e, transport.Host{Interrupts: b, Notifications: b, Log: virtiotest.Log(t, nil)}); err == nil {
			t.Errorf("queues %v were taken", sizes)
		}
		var p [1]byte
		if e.ReadConfig(0, p[:]); p[0] != 0 {
			t.Errorf("queues %v: the device was not reset", sizes)
		}
	}
}

func TestQueueRegisters(t *testing.T) {
	g := newGuest(t)
	g.negotiate(virtio.FeatureVersion1)
	g.write(common+22, 2, 1)
	if g.read(common+24, 2) != 2*queueSize || g.read(common+30, 2) != 1 || g.read(common+26, 2) != 0xffff {
		t.Error("queue 1 at the start")
	}
	g.write(common+26, 2, 3) // there are 3 vectors
	if g.read(common+26, 2) != 0xffff {
		t.Error("a vector that is not there")
	}
	g.write(common+16, 2, 2)
	if g.read(common+16, 2) != 2 {
		t.Error("configuration vector")
	}
	g.write(common+32, 8, 0x1122334455667788)
	if g.read(common+32, 8) != 0x1122334455667788 {
		t.Errorf("descriptors at %#x", g.read(common+32, 8))
	}
	g.write(common+28, 2, 1)
	g.write(common+24, 2, 4)
	g.write(common+32, 4, 0)
	if g.read(common+28, 2) != 1 || g.read(common+24, 2) != 2*queueSize || g.read(common+32, 4) != 0x55667788 {
		t.Error("an enabled queue changed")
	}
	g.write(common+28, 2, 0)
	if g.read(common+28, 2) != 1 {
		t.Error("a queue was disabled by queue_enable")
	}
	g.write(common+22, 2, 2)
	if g.read(common+24, 2) != 0 || g.read(common+28, 2) != 0 {
		t.Error("queue 2 of 2")
	}
	g.write(common+28, 2, 1)
	g.write(common+32, 4, 5)
	// Queue 1's descriptors are not RAM.
	g.write(common+20, 1, 15)
	if g.status() != 15|64 {
		t.Errorf("status %#x", g.status())
	}
}

// Requests go through, by split and packed rings, by ioeventfd and by exits.
func TestEcho(t *testing.T) {
	for _, features := range []uint64{virtio.FeatureVersion1, virtio.FeatureVersion1 | virtio.FeatureEventIdx, virtio.FeatureVersion1 | virtio.FeatureRingPacked, allFeatures} {
		for _, refuse := range []error{nil, errors.New("no ioeventfd")} {
			t.Run(fmt.Sprintf("features %#x ioeventfd %v", features, refuse), func(t *testing.T) {
				g := newGuest(t)
				g.board.refuse = refuse
				d := g.start(features)
				if g.echo.Negotiated != features {
					t.Errorf("negotiated %#x", g.echo.Negotiated)
				}
				for n := range 50 {
					g.echoed(d[n%2], n%2, fmt.Sprintf("request %d", n), g.interrupted(n%2))
				}
				if got := g.read(isr, 1); got&1 != 1 {
					t.Errorf("ISR %#x", got)
				}
				if got := g.read(isr, 1); got != 0 {
					t.Errorf("ISR %#x after it was read", got)
				}
			})
		}
	}
}

func TestConfig(t *testing.T) {
	g := newGuest(t)
	g.start(allFeatures)
	g.write(device, 8, 0x1122334455667788)
	if g.read(device+4, 4) != 0x11223344 || g.read(device+8, 4) != 0 || g.read(device+0x1000-4, 4) != 0 {
		t.Error("device configuration")
	}
	before := g.read(common+21, 1)
	g.echo.Set(7)
	g.board.interrupt(t, 0x40)
	if g.read(common+21, 1) != before+1 || g.read(isr, 1)&2 == 0 || g.read(device, 8) != 7 {
		t.Error("a change of the configuration")
	}
}

// The window in the configuration space reaches what the BAR does.
func TestPCIWindow(t *testing.T) {
	g := newGuest(t)
	at := 0
	for c := int(g.config(0x34, 1)); c != 0; c = int(g.config(c+1, 1)) {
		if g.config(c, 1) == 9 && g.config(c+3, 1) == 5 {
			at = c
		}
	}
	access := func(bar, off, n uint32) {
		g.setConfig(at+4, 1, bar)
		g.setConfig(at+8, 4, off)
		g.setConfig(at+12, 4, n)
	}
	access(0, 20, 1)
	g.setConfig(at+16, 1, 3)
	if g.status() != 3 || g.config(at+16, 4)&0xff != 3 {
		t.Errorf("status %#x, in the window %#x", g.status(), g.config(at+16, 4))
	}
	g.setConfig(4, 2, 0) // decoding off: the window still works
	access(0, 18, 2)
	if got := g.config(at+16, 2); got != 2 {
		t.Errorf("number of queues %d", got)
	}
	for _, bad := range [][3]uint32{{0, 19, 2}, {0, 0, 3}, {0, 0x3ffe, 4}, {1, 0, 4}, {77, 0, 4}, {0, 0xfffffffc, 4}} {
		access(bad[0], bad[1], bad[2])
		g.setConfig(at+16, 4, 0x12345678)
		if got := g.config(at+16, 4); got != 0x12345678 {
			t.Errorf("window %v reads %#x", bad, got)
		}
	}
}

// ioeventfds follow the BAR, and are there only while the queues are in use.
func TestNotificationsMove(t *testing.T) {
	g := newGuest(t)
	if len(g.board.places) != 0 {
		t.Errorf("ioeventfds %v before there are queues", g.board.places)
	}
	d := g.start(allFeatures)
	g.setConfig(4, 2, 0)
	if len(g.board.places) != 0 {
		t.Errorf("ioeventfds %v with decoding off", g.board.places)
	}
	g.setConfig(0x10, 4, 0xd0000000)
	g.setConfig(4, 2, 2)
	for i := range uint64(2) {
		if _, ok := g.board.ioeventfd(0xd0003000 + 4*i); !ok {
			t.Errorf("no ioeventfd at the new place: %v", g.board.places)
		}
	}
	g.setConfig(0x10, 4, 0xc0000000)
	g.echoed(d[0], 0, "back again", g.interrupted(0))
	g.write(common+20, 1, 0)
	if len(g.board.places) != 0 {
		t.Errorf("ioeventfds %v after a reset", g.board.places)
	}
}

func TestReset(t *testing.T) {
	g := newGuest(t)
	for round, features := range []uint64{allFeatures, virtio.FeatureVersion1, allFeatures} {
		d := g.start(features)
		g.echoed(d[0], 0, fmt.Sprintf("round %d", round), g.interrupted(0))
		g.write(device, 1, 9)
		g.request(d[1], 1, "never answered for certain")
		g.kick(1)
		g.write(common+20, 1, 0)
		before := g.mem.Snapshot()
		g.write(notify+4, 2, 1)
		if g.status() != 0 || g.read(common+16, 2) != 0xffff || g.read(device, 1) != 0 || g.read(isr, 1) != 0 {
			t.Errorf("round %d: not reset", round)
		}
		if string(g.mem.Snapshot()) != string(before) {
			t.Error("memory was written after a reset")
		}
	}
}

func TestQueueReset(t *testing.T) {
	for _, features := range []uint64{allFeatures, allFeatures &^ virtio.FeatureRingPacked} {
		g := newGuest(t)
		d := g.start(features)
		for round := range 3 {
			g.echoed(d[0], 0, "before", g.interrupted(0))
			g.write(common+22, 2, 0)
			g.write(common+58, 2, 1)
			if g.read(common+58, 2) != 0 || g.read(common+28, 2) != 0 || g.read(common+24, 2) != queueSize || g.read(common+26, 2) != 0xffff {
				t.Errorf("round %d: not reset", round)
			}
			g.echoed(d[1], 1, "the other one goes on", g.interrupted(1))
			g.kick(0)
			d[0] = virtiotest.NewDriver(t, g.mem, g.queueGPA(0), queueSize, features)
			g.write(common+22, 2, 0)
			g.write(common+26, 2, 1)
			g.setQueue(0, d[0].State())
		}
		g.echoed(d[0], 0, "after", g.interrupted(0))
		if g.status() != 15 {
			t.Errorf("status %#x", g.status())
		}
	}
	g := newGuest(t)
	d := g.start(allFeatures &^ virtio.FeatureRingReset)
	g.write(common+22, 2, 0)
	g.write(common+58, 2, 1)
	g.echoed(d[0], 0, "not negotiated", g.interrupted(0))
}

// The driver can reset a queue whose request was an error, and the device can
// then be paused and reset.
func TestResetOfABrokenQueue(t *testing.T) {
	for _, features := range []uint64{allFeatures, allFeatures &^ virtio.FeatureRingPacked} {
		g := newGuest(t)
		g.echo.Err = errors.New("bad request")
		d := g.start(features)
		g.request(d[0], 0, "bad")
		g.kick(0)
		<-g.logs
		g.write(common+22, 2, 0)
		g.write(common+58, 2, 1)
		if g.read(common+28, 2) != 0 || g.status() != 15|64 {
			t.Errorf("queue_enable %d, status %#x", g.read(common+28, 2), g.status())
		}
		check(t, g.device.Pause(t.Context()))
		_, err := g.device.SaveState()
		check(t, err)
		check(t, g.device.Resume())
		g.echo.Err = nil
		g.write(common+20, 1, 0)
		g.echoed(g.start(features)[0], 0, "after a reset", g.interrupted(0))
	}
}

// A driver that breaks a ring gets DEVICE_NEEDS_RESET and an interrupt, and
// after a reset the device works.
func TestNeedsReset(t *testing.T) {
	g := newGuest(t)
	d := g.start(virtio.FeatureVersion1)
	s := d[0].State()
	binary.LittleEndian.PutUint16(d[0].Bytes(s.Driver, 4)[2:], 100)
	g.kick(0)
	g.board.interrupt(t, 0x40)
	if g.status() != 15|64 {
		t.Errorf("status %#x", g.status())
	}
	if text := <-g.logs; !strings.Contains(text, "needs a reset") || !strings.Contains(text, "went on by 100") {
		t.Errorf("logged %q", text)
	}
	d = g.start(allFeatures)
	g.echoed(d[0], 0, "well again", g.interrupted(0))
}
