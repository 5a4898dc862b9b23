package net_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/virtiotest"
)

const (
	plain = net.FeatureMAC | net.FeatureStatus | net.FeatureMergeableRxBuffers | net.FeatureCtrlVQ |
		net.FeatureCtrlMACAddr | net.FeatureGuestAnnounce | net.FeatureMTU | net.FeatureCtrlGuestOffloads
	packed = virtio.FeatureRingPacked | virtio.FeatureEventIdx
)

// with returns the frame with a header changed.
func with(p []byte, change func(h []byte)) []byte {
	change(p)
	return p
}

func TestSend(t *testing.T) {
	tcp4 := func(h []byte) {
		h[0], h[1] = 1, 1
		binary.LittleEndian.PutUint16(h[2:], 54)
		binary.LittleEndian.PutUint16(h[4:], 1448)
		binary.LittleEndian.PutUint16(h[6:], 34)
		binary.LittleEndian.PutUint16(h[8:], 16)
	}
	change := func(f func([]byte), more func([]byte)) func([]byte) {
		return func(h []byte) { f(h); more(h) }
	}
	nothing := func([]byte) {}
	for _, c := range []struct {
		name     string
		features uint64
		frame    []byte
		header   func([]byte)
		arrives  bool
	}{
		{"plain", plain, frame(60), nothing, true},
		{"packed", plain | packed, frame(1514), nothing, true},
		{"with two VLAN tags", plain, frame(1522), nothing, true},
		{"longer than the MTU", plain, frame(1523), nothing, false},
		{"shorter than a header", plain, frame(13), nothing, false},
		{"nothing", plain, frame(0)[:5], nothing, false},
		{"checksum", plain | offloads, frame(100), func(h []byte) { h[0], h[6], h[8] = 1, 34, 16 }, true},
		{"checksum that was not negotiated", plain, frame(100), func(h []byte) { h[0], h[6], h[8] = 1, 34, 16 }, false},
		{"checksum behind the end", plain | offloads, frame(100), func(h []byte) { h[0], h[6], h[8] = 1, 90, 9 }, false},
		{"checksum far behind the end", plain | offloads, frame(100), func(h []byte) { h[0], h[6], h[7], h[8], h[9] = 1, 255, 255, 255, 255 }, false},
		{"TSO", plain | offloads, frame(40000), tcp4, true},
		{"the longest", plain | offloads, frame(net.MaxFrame), tcp4, true},
		{"longer than the longest", plain | offloads, frame(net.MaxFrame + 1), tcp4, false},
		{"TSO that was not negotiated", plain | net.FeatureCsum, frame(40000), tcp4, false},
		{"TSO with ECN", plain | offloads, frame(40000), change(tcp4, func(h []byte) { h[1] |= 0x80 }), true},
		{"TSO with ECN that was not negotiated", plain | offloads&^net.FeatureHostECN, frame(40000), change(tcp4, func(h []byte) { h[1] |= 0x80 }), false},
		{"TSO into nothing", plain | offloads, frame(40000), change(tcp4, func(h []byte) { h[4], h[5] = 0, 0 }), false},
		{"TSO without a checksum", plain | offloads, frame(40000), change(tcp4, func(h []byte) { h[0] = 0 }), false},
		{"TSO with a header longer than the frame", plain | offloads, frame(100), change(tcp4, func(h []byte) { h[2] = 101 }), false},
		{"TSO of IPv6", plain | offloads, frame(4000), change(tcp4, func(h []byte) { h[1] = 4 }), true},
		{"USO", plain | offloads, frame(4000), change(tcp4, func(h []byte) { h[1] = 5 }), true},
		{"USO with ECN", plain | offloads, frame(4000), change(tcp4, func(h []byte) { h[1] = 0x85 }), false},
		{"UFO, which is not offered", plain | offloads, frame(4000), change(tcp4, func(h []byte) { h[1] = 3 }), false},
		{"no known segmentation", plain | offloads, frame(4000), change(tcp4, func(h []byte) { h[1] = 9 }), false},
		{"ECN alone", plain | offloads, frame(100), func(h []byte) { h[1] = 0x80 }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, 1, c.features)
			if len(c.frame) >= net.HeaderBytes {
				c.header(c.frame)
			}
			r.send(0, c.frame)
			got := r.wire.sent(t, 0)
			n := r.d.Counters()
			if !c.arrives {
				if len(got) != 0 || n.TxDropped != 1 {
					t.Errorf("%d frames came through, %d were counted as dropped", len(got), n.TxDropped)
				}
				return
			}
			if len(got) != 1 || !bytes.Equal(got[0], c.frame) || n.TxFrames != 1 || n.TxBytes != uint64(len(c.frame)-net.HeaderBytes) {
				t.Errorf("%d frames came through, counted %+v", len(got), n)
			}
		})
	}
}

// What means nothing in this direction does not get to the host.
func TestSendCleansHeaders(t *testing.T) {
	r := newRig(t, 1, plain)
	r.send(0, with(frame(60), func(h []byte) { h[0], h[10], h[11] = 0xfe, 5, 6 }))
	if got := r.wire.sent(t, 0); len(got) != 1 || !bytes.Equal(got[0], frame(60)) {
		t.Errorf("got % x", got)
	}
}

// A frame of anything's size lands in the buffers that are there; the guest
// sees whole frames, and every page that was written is marked.
func TestReceive(t *testing.T) {
	for _, features := range []uint64{plain &^ net.FeatureMTU, plain&^net.FeatureMTU | packed} {
		r := newRig(t, 1, features)
		rng := rand.New(rand.NewPCG(1, 1))
		var room []virtiotest.Buffer
		at := r.data
		for range 200 {
			n := uint32(1 + rng.IntN(3000))
			room = append(room, virtiotest.Buffer{GPA: at, Len: n})
			at += 4096
		}
		before := r.mem.Snapshot()
		r.drivers[0].Indirect = true
		for _, b := range room {
			r.add(0, nil, []virtiotest.Buffer{{GPA: b.GPA, Len: b.Len / 2}, {GPA: b.GPA + uint64(b.Len/2), Len: b.Len - b.Len/2}})
		}
		for used := 0; used < 100; {
			want := frame(60 + rng.IntN(6000))
			r.wire.inject(t, 0, want)
			var got []byte
			first := used
			for len(got) < len(want) {
				u := r.next(0)
				b := room[used]
				used++
				if u.Len > b.Len || (u.Len < b.Len && len(got)+int(u.Len) < len(want)) {
					t.Fatalf("%d bytes in a buffer of %d", u.Len, b.Len)
				}
				got = append(got, r.bytes(b.GPA, uint64(u.Len))...)
			}
			if n := int(binary.LittleEndian.Uint16(got[10:])); n != used-first {
				t.Fatalf("num_buffers %d, %d were used", n, used-first)
			}
			if !bytes.Equal(got[net.HeaderBytes:], want[net.HeaderBytes:]) {
				t.Fatal("the frame came in pieces that do not fit")
			}
		}
		for _, gpa := range r.mem.Unmarked(before) {
			if gpa >= r.data { // below it the driver writes, too
				t.Errorf("written and not marked, a migration would lose it: page at gpa %#x", gpa)
			}
		}
	}
}

// A frame waits for buffers; one that can never have enough does not stop those
// behind it.
func TestReceiveWithoutRoom(t *testing.T) {
	r := newRig(t, 1, plain&^net.FeatureMTU)
	r.wire.inject(t, 0, frame(1000))
	r.add(0, nil, []virtiotest.Buffer{{GPA: r.data, Len: 600}})
	check(t, r.d.Pause(ctx(t)))
	check(t, r.d.Resume())
	if _, ok := r.drivers[0].Used(); ok {
		t.Error("half a frame came")
	}
	r.add(0, nil, []virtiotest.Buffer{{GPA: r.data + 4096, Len: 600}})
	if u := r.next(0); u.Len != 600 {
		t.Errorf("%d bytes", u.Len)
	}
	if u := r.next(0); u.Len != 412 {
		t.Errorf("%d bytes", u.Len)
	}
	// Each buffer of 8 bytes: all of the ring is not enough.
	for i := range uint64(queueSize) {
		r.add(0, nil, []virtiotest.Buffer{{GPA: r.data + i*8, Len: 8}})
	}
	r.wire.inject(t, 0, frame(4000))
	r.wire.inject(t, 0, frame(20))
	for range 4 {
		r.next(0)
	}
	if n := r.d.Counters(); n.RxDropped != 1 || n.RxFrames != 2 {
		t.Errorf("counted %+v", n)
	}
}

func TestReceiveWithoutMerging(t *testing.T) {
	r := newRig(t, 1, plain&^net.FeatureMergeableRxBuffers)
	r.add(0, nil, []virtiotest.Buffer{{GPA: r.data, Len: 12}, {GPA: r.data + 4096, Len: 100}})
	r.wire.inject(t, 0, frame(101))
	r.wire.inject(t, 0, frame(100))
	if u := r.next(0); u.Len != 112 {
		t.Errorf("%d bytes", u.Len)
	}
	if h := r.bytes(r.data, 12); h[10] != 1 || h[11] != 0 {
		t.Errorf("num_buffers % x", h[10:])
	}
	if n := r.d.Counters(); n.RxDropped != 1 || n.RxFrames != 1 {
		t.Errorf("counted %+v", n)
	}
}

// What the guest has not said that it takes does not get to it.
func TestReceiveOnlyWhatWasNegotiated(t *testing.T) {
	r := newRig(t, 1, plain)
	for range 4 {
		r.add(0, nil, []virtiotest.Buffer{{GPA: r.data, Len: 2000}})
	}
	r.wire.inject(t, 0, with(frame(100), func(h []byte) { h[0] = 1 }))
	r.wire.inject(t, 0, with(frame(100), func(h []byte) { h[1] = 1 }))
	r.wire.inject(t, 0, frame(9))
	r.wire.inject(t, 0, with(frame(100), func(h []byte) { h[0] = 2 }))
	r.next(0)
	if h := r.bytes(r.data, 12); h[0] != 0 {
		t.Errorf("flags %#x", h[0])
	}
	if n := r.d.Counters(); n.RxDropped != 3 || n.RxFrames != 1 {
		t.Errorf("counted %+v", n)
	}
}

func TestReceiveBufferWithoutRoom(t *testing.T) {
	r := newRig(t, 1, plain)
	r.add(0, []virtiotest.Buffer{{GPA: r.data, Len: 2000}}, nil)
	r.wire.inject(t, 0, frame(100))
	if err := <-r.broken; err == nil {
		t.Error("no reason")
	}
	// It stands still, and can be paused and reset.
	check(t, r.d.Pause(ctx(t)))
	check(t, r.d.Resume())
}

func TestControl(t *testing.T) {
	le := func(v uint64, n int) []byte { return binary.LittleEndian.AppendUint64(nil, v)[:n] }
	r := newRig(t, 4, plain|offloads|net.FeatureMultiQueue)
	if n, guest := r.wire.set(); n != 1 || guest != offloads&(net.FeatureGuestCsum|net.FeatureGuestTSO4|net.FeatureGuestTSO6|net.FeatureGuestECN|net.FeatureGuestUSO4|net.FeatureGuestUSO6) {
		t.Errorf("starts with %d pairs, offloads %#x", n, guest)
	}
	for _, bad := range [][]byte{
		{4, 0, 0, 0}, {4, 0, 5, 0}, {4, 0, 255, 255}, {4, 0, 1}, {4, 0, 1, 0, 0}, {4, 1, 1, 0}, {9, 9}, {1, 1, 1, 2, 3, 4, 5, 6},
		{1, 1, 0, 0, 0, 0, 0, 0}, {1, 0}, {3, 1}, {3, 0, 0}, append([]byte{5, 0}, le(net.FeatureMAC, 8)...), append([]byte{5, 0}, le(0, 7)...),
		append([]byte{4, 0}, make([]byte, 300)...),
	} {
		if a := r.command(bad[0], bad[1], bad[2:]...); a != 1 {
			t.Errorf("% x is answered with %d", bad, a)
		}
	}
	for _, n := range []int{4, 2, 3, 1, 2} {
		if a := r.command(4, 0, le(uint64(n), 2)...); a != 0 {
			t.Fatalf("%d pairs: answer %d", n, a)
		}
		if got, _ := r.wire.set(); got != n {
			t.Errorf("%d pairs, want %d", got, n)
		}
	}
	r.send(1, frame(60))
	r.send(2, frame(60))
	if a, b := len(r.wire.sent(t, 1)), len(r.wire.sent(t, 2)); a != 1 || b != 0 {
		t.Errorf("%d frames by a queue in use, %d by one that is not", a, b)
	}
	r.add(2, nil, []virtiotest.Buffer{{GPA: r.data, Len: 2000}})
	r.wire.inject(t, 1, frame(60))
	r.next(2)
	if a := r.command(5, 0, le(net.FeatureGuestCsum, 8)...); a != 0 {
		t.Errorf("offloads: answer %d", a)
	}
	if _, guest := r.wire.set(); guest != net.FeatureGuestCsum {
		t.Errorf("offloads %#x", guest)
	}
	if a := r.command(1, 1, 2, 2, 3, 4, 5, 6); a != 0 || r.d.MAC() != (net.MAC{2, 2, 3, 4, 5, 6}) {
		t.Errorf("MAC: answer %d, %s", a, r.d.MAC())
	}
	r.wire.mu.Lock()
	r.wire.fail = virtio.ErrRing
	r.wire.mu.Unlock()
	if a := r.command(4, 0, 1, 0); a != 1 || len(r.logged) != 1 {
		t.Errorf("a host that cannot: answer %d, %d lines", a, len(r.logged))
	}
	r.d.Reset()
	if r.d.MAC() != guestMAC {
		t.Error("a new driver finds the old one's address")
	}
}

// Without VIRTIO_NET_F_MQ the control queue comes behind the first pair.
func TestControlQueueOfADriverWithOnePair(t *testing.T) {
	r := newRig(t, 4, plain)
	if a := r.command(1, 1, 2, 2, 3, 4, 5, 6); a != 0 {
		t.Errorf("answer %d", a)
	}
	if a := r.command(4, 0, 1, 0); a != 1 {
		t.Errorf("pairs that were not negotiated: answer %d", a)
	}
	r.add(2, []virtiotest.Buffer{{GPA: r.data, Len: 2}}, nil)
	if err := <-r.broken; err == nil {
		t.Error("a request without room for an answer was taken")
	}
}

func TestAnnounce(t *testing.T) {
	r := newRig(t, 1, plain)
	r.d.Announce()
	<-r.changed
	if r.status() != 3 {
		t.Errorf("status %#x", r.status())
	}
	var got [][]byte
	for deadline := time.Now().Add(10 * time.Second); len(got) < 2 && time.Now().Before(deadline); {
		got = append(got, r.wire.sent(t, 0)...)
		runtime.Gosched()
	}
	want := make([]byte, net.HeaderBytes+60)
	copy(want[12:], "\xff\xff\xff\xff\xff\xff\x52\x54\x00\x01\x02\x03\x80\x35\x00\x01\x08\x00\x06\x04\x00\x03\x52\x54\x00\x01\x02\x03\x00\x00\x00\x00\x52\x54\x00\x01\x02\x03")
	if len(got) < 2 || !bytes.Equal(got[0], want) || !bytes.Equal(got[1], want) {
		t.Errorf("% x, want % x", got, want)
	}
	if a := r.command(3, 0); a != 0 || r.status() != 1 {
		t.Errorf("acknowledged: answer %d, status %#x", a, r.status())
	}
	check(t, r.d.Pause(ctx(t)))
	r.wire.sent(t, 0)
	check(t, r.d.Resume())
	r.d.Announce()
	r.d.Reset()
	r.d.Announce() // there is no driver
}

func TestLink(t *testing.T) {
	r := newRig(t, 1, plain)
	r.d.SetLink(false)
	<-r.changed
	r.send(0, frame(60))
	if n := len(r.wire.sent(t, 0)); n != 0 || r.status() != 0 {
		t.Errorf("%d frames by a link that is down, status %d", n, r.status())
	}
	r.d.SetLink(true)
	<-r.changed
	r.send(0, frame(60))
	if n := len(r.wire.sent(t, 0)); n != 1 || r.status() != 1 {
		t.Errorf("%d frames by a link that is up, status %d", n, r.status())
	}
	var c [20]byte
	r.d.ReadConfig(0, c[:])
	if !bytes.Equal(c[:], []byte{0x52, 0x54, 0, 1, 2, 3, 1, 0, 1, 0, 0xdc, 5, 0, 0, 0, 0, 0, 0, 0, 0}) {
		t.Errorf("configuration % x", c)
	}
	r.d.ReadConfig(1<<31, c[:])
	r.d.WriteConfig(0, c[:])
}

// A device that is paused moves nothing; a device at the destination goes on where it was.
func TestMove(t *testing.T) {
	r := newRig(t, 2, plain|net.FeatureMultiQueue)
	if a := r.command(4, 0, 2, 0); a != 0 {
		t.Fatal("no pairs")
	}
	for range 10 {
		r.add(2, nil, []virtiotest.Buffer{{GPA: r.data, Len: 2000}})
	}
	check(t, r.d.Pause(ctx(t)))
	check(t, r.d.Pause(ctx(t)))
	before := r.mem.Snapshot()
	r.wire.inject(t, 1, frame(60))
	var saved []virtio.QueueState
	for _, q := range r.queues {
		s, err := q.SaveState()
		check(t, err)
		saved = append(saved, s)
	}
	state, err := r.d.SaveState()
	check(t, err)
	if !bytes.Equal(r.mem.Snapshot(), before) {
		t.Error("a paused device writes")
	}
	r.d.Reset()
	r.newDevice(r.wire)
	check(t, r.d.LoadState(state))
	for i, q := range r.queues {
		check(t, q.Start(saved[i], r.features))
	}
	check(t, r.d.Activate(r.features, r.queues, r))
	r.next(2)
	if n, _ := r.wire.set(); n != 2 {
		t.Errorf("%d pairs", n)
	}
}

func TestStateRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	d, err := net.New(net.Config{Backend: newWire(t, 4), MAC: guestMAC})
	check(t, err)
	for range 200 {
		raw, err := strictcbor.Marshal(net.State{
			MAC: net.MAC{byte(rng.Uint32()) &^ 1, 2, byte(rng.Uint32())}, Status: uint16(1 + 2*rng.IntN(2)), Pairs: uint16(1 + rng.IntN(4)),
			Offloads: rng.Uint64() & (net.FeatureGuestCsum | net.FeatureGuestTSO4 | net.FeatureGuestUSO6), OffloadsSet: rng.IntN(2) == 0,
		})
		check(t, err)
		check(t, d.LoadState(raw))
		again, err := d.SaveState()
		check(t, err)
		if !bytes.Equal(raw, again) {
			t.Fatalf("saved % x, loaded, saved % x", raw, again)
		}
	}
	good := net.State{MAC: guestMAC, Pairs: 1}
	for _, change := range []func(*net.State){
		func(s *net.State) { s.MAC[0] = 1 },
		func(s *net.State) { s.Pairs = 0 },
		func(s *net.State) { s.Pairs = 5 },
		func(s *net.State) { s.Status = 4 },
		func(s *net.State) { s.Offloads = 1 },
	} {
		s := good
		change(&s)
		raw, err := strictcbor.Marshal(s)
		check(t, err)
		if d.LoadState(raw) == nil {
			t.Errorf("%+v was taken for a state", s)
		}
	}
	if d.LoadState([]byte{0xff}) == nil {
		t.Error("garbage was taken for a state")
	}
}

// Nothing is allocated for a frame, either way.
func TestNoAllocation(t *testing.T) {
	r := newRig(t, 1, plain)
	const frames = 60 // the socket takes no more
	p := frame(60)
	before, after := new(runtime.MemStats), new(runtime.MemStats)
	for round := range 3 { // the first ones make the chains
		for range frames {
			r.add(0, nil, []virtiotest.Buffer{{GPA: r.data, Len: 2000}})
		}
		runtime.ReadMemStats(before)
		for i := range uint64(frames) {
			r.wire.inject(t, 0, p)
			for r.d.Counters().RxFrames < uint64(round)*frames+i+1 {
				runtime.Gosched()
			}
		}
		runtime.ReadMemStats(after)
		for range frames {
			r.next(0)
		}
	}
	if n := after.Mallocs - before.Mallocs; n > frames/4 {
		t.Errorf("%d allocations for %d frames", n, frames)
	}
}

// A pause that there is no time for leaves a device that works.
func TestPauseThatFails(t *testing.T) {
	r := newRig(t, 2, plain|net.FeatureMultiQueue)
	over, cancel := context.WithCancel(context.Background())
	cancel()
	for range 20 {
		if err := r.d.Pause(over); err == nil {
			check(t, r.d.Resume())
		}
		if a := r.command(3, 0); a != 0 {
			t.Errorf("answer %d", a)
		}
		r.send(0, frame(60))
	}
	if n := r.d.Counters(); n.TxFrames != 20 {
		t.Errorf("counted %+v", n)
	}
}

// TestLinkIsOfThisHost: a guest that comes from a host where its link was down finds
// the link of this one, and is told; so does one whose link was up.
func TestLinkIsOfThisHost(t *testing.T) {
	for _, up := range []bool{true, false} {
		r := newRig(t, 1, plain)
		r.d.SetLink(!up)
		check(t, r.d.Pause(ctx(t)))
		state, err := r.d.SaveState()
		check(t, err)
		r.d.Reset()
		r.newDevice(r.wire)
		r.d.SetLink(up)
		check(t, r.d.LoadState(state))
		if len(r.changed) != 0 {
			t.Error("told before it runs")
		}
		check(t, r.d.Activate(r.features, r.queues, r))
		want := uint16(0)
		if up {
			want = 1
		}
		if got := r.status(); got != want || len(r.changed) == 0 {
			t.Errorf("the link is up: %v; the guest finds status %d, told %d times", up, got, len(r.changed))
		}
		if r.d.SetLink(!up); r.status() == want {
			t.Error("the link does not change any more")
		}
	}
}

// TestNegotiated: what a guest takes along is what its driver uses: the tap's MTU if it
// was told, and no offload that it never took.
func TestNegotiated(t *testing.T) {
	d, err := net.New(net.Config{Backend: newWire(t, 1), MAC: guestMAC, MTU: 9000})
	check(t, err)
	spec := &net.Spec{Options: net.Options{MAC: guestMAC, Queues: 1}}
	for _, c := range []struct {
		features, want uint64
		mtu            uint16
	}{
		{0, 0, 0},
		{virtio.FeatureVersion1 | net.FeatureMAC | net.FeatureCsum, net.FeatureMAC | net.FeatureCsum, 0},
		{net.FeatureMTU | net.FeatureHostUSO, net.FeatureMTU | net.FeatureHostUSO, 9000},
	} {
		n := spec.Negotiated(d, c.features).(*net.Spec)
		if n.Features != c.want || n.MTU != c.mtu || n.MAC != guestMAC || spec.Features != 0 || spec.MTU != 0 {
			t.Errorf("features %#x: %+v", c.features, n)
		}
	}
	// A host with an older kernel takes the guest that does not use UDP segmentation.
	older := newWire(t, 1)
	older.lacks = net.FeatureHostUSO | net.FeatureGuestUSO4 | net.FeatureGuestUSO6
	there, err := net.New(net.Config{Backend: older, MAC: guestMAC, MTU: 9000})
	check(t, err)
	uses := d.Features() &^ older.lacks
	check(t, spec.Negotiated(d, uses).(*net.Spec).Lacks(there))
	err = spec.Negotiated(d, uses|net.FeatureHostUSO|net.FeatureMTU).(*net.Spec).Lacks(there)
	if err == nil || err.Error() != "wire: this host's kernel lacks what the guest's driver uses: VIRTIO_NET_F_HOST_USO" {
		t.Errorf("told %v", err)
	}
	spec.MTU = 1400
	if n := spec.Negotiated(d, 0).(*net.Spec); n.MTU != 1400 {
		t.Errorf("the MTU that the user asked for became %d", n.MTU)
	}
}
