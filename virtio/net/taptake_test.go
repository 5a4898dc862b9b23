package net_test

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/virtiotest"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// prepare makes a tap that stays, as an administrator would.
func prepare(t *testing.T, name string, mtu int, flags netlink.TuntapFlag) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	made := &netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR | flags}
	if flags&netlink.TUNTAP_MULTI_QUEUE != 0 {
		made.Queues = 1
	}
	check(t, netlink.LinkAdd(made))
	for _, f := range made.Fds {
		check(t, f.Close())
	}
	check(t, netlink.LinkSetMTU(made, mtu))
}

func tapLink(t *testing.T, name string) *netlink.Tuntap {
	t.Helper()
	link, err := netlink.LinkByName(name)
	check(t, err)
	return link.(*netlink.Tuntap)
}

func hasCarrier(l netlink.Link) bool { return l.Attrs().RawFlags&unix.IFF_LOWER_UP != 0 }

// segments asks the kernel whether the tap's guest takes TCP segments (ETHTOOL_GTSO).
func segments(t *testing.T, name string) bool {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	defer func() { check(t, unix.Close(fd)) }()
	value := struct{ cmd, data uint32 }{cmd: 0x1e}
	var req struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(req.name[:], name)
	req.data = unsafe.Pointer(&value)
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); e != 0 {
		t.Fatalf("ETHTOOL_GTSO %s: %v", name, e)
	}
	return value.data != 0
}

// TestTapIsOnlyReserved: until it is taken, a tap is busy for others and as it was; it
// has no carrier, and no frame that is sent to it is in it later.
func TestTapIsOnlyReserved(t *testing.T) {
	namespace(t)
	br := bridge(t, "br0")
	prepare(t, "ours", 1400, 0)
	check(t, netlink.LinkSetUp(tapLink(t, "ours")))
	for _, name := range []string{"ours", "made"} {
		tap, err := net.OpenTap(options(t, "tap="+name+",bridge=br0,mac=52:54:00:01:02:03"))
		check(t, err)
		if _, err := net.OpenTap(options(t, "tap="+name)); !errors.Is(err, unix.EBUSY) {
			t.Errorf("%s: another one opens it: %v", name, err)
		}
		link := tapLink(t, name)
		if hasCarrier(link) || name == "ours" && link.MasterIndex != 0 {
			t.Errorf("%s before it is taken: %+v", name, link.LinkAttrs)
		}
		r := newRigOn(t, tap, nil, 1, plain|tap.Offloads())
		for i := range 10 {
			r.add(0, nil, []virtiotest.Buffer{{GPA: r.data + uint64(i)*4096, Len: 2000}})
		}
		side := listen(t, link)
		early, late := ethernet(guestMAC, net.MAC{2, 0, 0, 0, 0, 1}, 100), ethernet(guestMAC, net.MAC{2, 0, 0, 0, 0, 1}, 300)
		for range 100 {
			_, _ = unix.Write(side, early)
		}
		check(t, tap.Take())
		check(t, tap.Take())
		link = tapLink(t, name)
		if !hasCarrier(link) || link.MasterIndex != br.Attrs().Index {
			t.Errorf("%s when it is taken: %+v", name, link.LinkAttrs)
		}
		for received := 0; received < 300; { // the host may send frames of its own
			_, err := unix.Write(side, late)
			check(t, err)
			u := r.next(0)
			received = int(u.Len) - net.HeaderBytes
			if received == 100 {
				t.Fatalf("%s: a frame from before comes late", name)
			}
			r.add(0, nil, []virtiotest.Buffer{{GPA: r.data, Len: 2000}})
		}
	}
}

// TestTapThatIsNotTaken: a destination that gives up leaves a tap as it found it.
func TestTapThatIsNotTaken(t *testing.T) {
	namespace(t)
	bridge(t, "br0")
	for i, flags := range []netlink.TuntapFlag{0, netlink.TUNTAP_MULTI_QUEUE} {
		name := fmt.Sprintf("tap%d", i)
		prepare(t, name, 9000, flags)
		before := tapLink(t, name)
		tap, err := net.OpenTap(net.Options{Tap: name, Bridge: "br0", MAC: guestMAC, MTU: 1500, Queues: 1, Arriving: true})
		check(t, err)
		check(t, tap.Close())
		after := tapLink(t, name)
		if after.MTU != before.MTU || after.RawFlags&unix.IFF_UP != before.RawFlags&unix.IFF_UP || after.MasterIndex != 0 || after.NonPersist {
			t.Errorf("%s: %+v, was %+v", name, after, before)
		}
	}
}

// TestSharedTap: two processes have queues of one tap. The one that waits for the guest
// takes no frame from the other and changes nothing, in both directions of a migration.
func TestSharedTap(t *testing.T) {
	namespace(t)
	bridge(t, "br0")
	prepare(t, "mq0", 1500, netlink.TUNTAP_MULTI_QUEUE)
	const words = "tap=mq0,queues=2,bridge=br0,mac=52:54:00:01:02:03"
	taps := []*net.Tap{openTap(t, words), nil}
	rigs := []*rig{newRigOn(t, taps[0], nil, 2, plain|taps[0].Offloads()|net.FeatureMultiQueue), nil}
	if !segments(t, "mq0") {
		t.Fatal("the guest does not take segments")
	}
	side := listen(t, tapLink(t, "mq0"))
	sent := 0
	// flood sends frames of many flows, all of which one side has to get.
	flood := func(to *rig, n int) {
		t.Helper()
		q := to.received(t)
		for range n {
			sent++
			p := ethernet(guestMAC, net.MAC{2, 0, 0, byte(sent >> 16), byte(sent >> 8), byte(sent)}, 100)
			_, err := unix.Write(side, p)
			check(t, err)
		}
		deadline := time.Now().Add(testenv.Patience)
		for to.received(t)-q < n {
			if time.Now().After(deadline) {
				t.Fatalf("%d frames of %d arrive", to.received(t)-q, n)
			}
			time.Sleep(time.Millisecond)
		}
		for _, used := to.drivers[0].Used(); used; _, used = to.drivers[0].Used() {
			to.supply(1)
		}
	}
	rigs[0].supply(200)
	flood(rigs[0], 50)

	var err error
	taps[1], err = net.OpenTap(options(t, words))
	check(t, err)
	if taps[1].Offloads() != taps[0].Offloads() {
		t.Errorf("offloads %#x at one side, %#x at the other", taps[0].Offloads(), taps[1].Offloads())
	}
	if !segments(t, "mq0") || !hasCarrier(tapLink(t, "mq0")) {
		t.Error("to open it a second time changes the tap")
	}
	flood(rigs[0], 50)

	for at := range 4 { // there, back, there, and back
		from, to := at%2, 1-at%2
		check(t, rigs[from].d.Pause(ctx(t)))
		check(t, taps[from].Yield())
		check(t, taps[to].Take())
		if rigs[to] == nil {
			rigs[to] = newRigOn(t, taps[to], nil, 2, plain|taps[to].Offloads()|net.FeatureMultiQueue)
			rigs[to].supply(200)
		} else {
			check(t, rigs[to].d.Resume())
		}
		flood(rigs[to], 50)
	}
}

// supply gives buffers to the first receive queue.
func (r *rig) supply(n int) {
	r.t.Helper()
	for i := range n {
		r.add(0, nil, []virtiotest.Buffer{{GPA: r.data + uint64(i)*2048, Len: 2048}})
	}
}

// received counts the test's frames that the guest got.
func (r *rig) received(t *testing.T) int {
	t.Helper()
	return int(r.d.Counters().RxFrames)
}

// TestMTUIsPromised: a guest that comes here finds the MTU that it was told, or is
// refused with the numbers.
func TestMTUIsPromised(t *testing.T) {
	namespace(t)
	prepare(t, "small", 1400, 0)
	prepare(t, "large", 9000, 0)
	o := net.Options{MAC: guestMAC, MTU: 9000, Queues: 1, Arriving: true}
	o.Tap = "small"
	_, err := net.OpenTap(o)
	if err == nil || !strings.Contains(err.Error(), "tap small: expected an MTU of 9000, as the guest was told, found 1400 (ip link set small mtu 9000)") {
		t.Errorf("told %v", err)
	}
	for _, c := range []struct {
		tap      string
		mtu      uint16
		arriving bool
		told     uint16
		is       int
	}{
		{"small", 1400, true, 1400, 1400},
		{"small", 0, true, 1400, 1400},
		{"small", 0, false, 1400, 1400},
		{"large", 1500, true, 1500, 9000}, // the guest keeps its promise, and other users theirs
		{"made", 9000, true, 9000, 9000},
		{"made", 0, true, 1500, 1500},
		{"small", 1300, false, 1300, 1300}, // the user of this host asks for it
	} {
		o.Tap, o.MTU, o.Arriving = c.tap, c.mtu, c.arriving
		spec := &net.Spec{Options: o}
		b, err := spec.Open(nil)
		check(t, err)
		check(t, b.(virtio.Locker).Lock())
		if got := tapLink(t, c.tap).MTU; got != c.is || b.Info().(*net.Info).MTU != c.told {
			t.Errorf("%+v: the tap has %d, the guest is told %d", c, got, b.Info().(*net.Info).MTU)
		}
		check(t, b.Close())
	}
}

// TestMTUOfABridge: a guest that arrives with a smaller MTU than a bridge's does not make
// the bridge's smaller; a user of this host may.
func TestMTUOfABridge(t *testing.T) {
	for arriving, want := range map[bool]int{true: 1500, false: 1400} {
		t.Run(fmt.Sprint(arriving), func(t *testing.T) {
			namespace(t)
			bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0", MTU: 1500}}
			check(t, netlink.LinkAdd(bridge))
			check(t, netlink.LinkSetUp(bridge))
			spec := &net.Spec{Options: net.Options{Tap: "made", Bridge: "br0", MAC: guestMAC, MTU: 1400, Queues: 1, Arriving: arriving}}
			b, err := spec.Open(nil)
			check(t, err)
			check(t, b.(virtio.Locker).Lock())
			now, err := netlink.LinkByName("br0")
			check(t, err)
			if got := now.Attrs().MTU; got != want || b.Info().(*net.Info).MTU != 1400 {
				t.Errorf("the bridge has %d, want %d; the guest is told %d", got, want, b.Info().(*net.Info).MTU)
			}
			check(t, b.Close())
		})
	}
}

// TestTapsLink: the guest's link is the tap's, as it changes.
func TestTapsLink(t *testing.T) {
	namespace(t)
	tap := openTap(t, "tap=tap0")
	r := newRigOn(t, tap, nil, 1, plain)
	tap.OnLink(r.d.SetLink)
	for _, c := range []struct {
		change func(netlink.Link) error
		status uint16
	}{{netlink.LinkSetDown, 0}, {netlink.LinkSetUp, 1}, {func(l netlink.Link) error { return netlink.LinkSetMTU(l, 1400) }, 1}, {netlink.LinkDel, 0}} {
		check(t, c.change(tapLink(t, "tap0")))
		for was := r.status(); was != c.status; was = r.status() {
			select {
			case <-r.changed:
			case <-time.After(testenv.Patience):
				t.Fatalf("status %d, want %d", was, c.status)
			}
		}
	}
}

// TestTapThatIsGoneWhenItIsTaken: a guest does not start where its tap has gone while it
// was on its way; one that had it and takes it back goes on, without a link.
func TestTapThatIsGoneWhenItIsTaken(t *testing.T) {
	namespace(t)
	open := func(name string) virtio.Backend {
		t.Helper()
		b, err := (&net.Spec{Options: net.Options{Tap: name, MAC: guestMAC, Queues: 1}}).Open(nil)
		check(t, err)
		return b
	}
	b := open("tap0")
	check(t, netlink.LinkDel(tapLink(t, "tap0")))
	if err := b.(virtio.Locker).Lock(); err == nil || !strings.Contains(err.Error(), "tap tap0") {
		t.Errorf("told %v", err)
	}
	check(t, b.(virtio.Locker).Unlock(t.Context()))
	check(t, b.Close())

	prepare(t, "mq0", 1500, netlink.TUNTAP_MULTI_QUEUE)
	b, other := open("mq0"), openTap(t, "tap=mq0")
	check(t, b.(virtio.Locker).Lock())
	check(t, b.(virtio.Locker).Unlock(t.Context())) // it is shared, so its queue is detached
	check(t, netlink.LinkDel(tapLink(t, "mq0")))
	check(t, b.(virtio.Locker).Lock())
	d, err := b.Attach(virtio.Guest{})
	check(t, err)
	var status [2]byte
	if d.ReadConfig(6, status[:]); status[0] != 0 {
		t.Error("the link is up")
	}
	check(t, b.Close())
	check(t, other.Close())
}

// TestSharedTapIsOpened: to open a tap that another process uses, again and again, takes
// no frame from it.
func TestSharedTapIsOpened(t *testing.T) {
	namespace(t)
	prepare(t, "mq0", 1500, netlink.TUNTAP_MULTI_QUEUE)
	const words = "tap=mq0,queues=4,mac=52:54:00:01:02:03"
	tap := openTap(t, words)
	r := newRigOn(t, tap, nil, 4, plain|tap.Offloads()|net.FeatureMultiQueue)
	r.supply(200)
	side := listen(t, tapLink(t, "mq0"))
	const all = 2000
	var sent atomic.Int64
	go func() { // of many flows, and never more than the tap holds
		for n := sent.Load(); n < all; {
			if n-int64(r.d.Counters().RxFrames) > 50 {
				time.Sleep(100 * time.Microsecond)
				continue
			}
			if _, err := unix.Write(side, ethernet(guestMAC, net.MAC{2, 0, 0, 0, byte(n >> 8), byte(n)}, 100)); err != nil {
				return
			}
			n = sent.Add(1)
		}
	}()
	mine := func(gpa uint64) bool { return r.bytes(gpa+net.HeaderBytes+12, 1)[0] == 0x88 }
	received, at := 0, 0
	for deadline := time.Now().Add(testenv.Patience); received < all; {
		if sent.Load() < all {
			other, err := net.OpenTap(options(t, words))
			check(t, err)
			check(t, other.Close())
		} else {
			time.Sleep(time.Millisecond)
		}
		for _, used := r.drivers[0].Used(); used; _, used = r.drivers[0].Used() {
			gpa := r.data + uint64(at)*2048
			if at = (at + 1) % 200; mine(gpa) {
				received++
			}
			r.add(0, nil, []virtiotest.Buffer{{GPA: gpa, Len: 2048}})
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d frames arrive", received, sent.Load())
		}
	}
}
