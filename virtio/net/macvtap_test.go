package net_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/virtiotest"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestMain is also the process that keeps a macvtap.
func TestMain(m *testing.M) {
	const keeper = "__macvtap"
	if len(os.Args) == 3 && os.Args[1] == keeper {
		_ = net.KeepMacvtap(os.Args[2], func(string) error { return nil })
		os.Exit(0)
	}
	net.MacvtapStart.Command = []string{"/proc/self/exe", keeper}
	os.Exit(m.Run())
}

// cable makes a network namespace with a cable between v0 and v1, which are up.
func cable(t *testing.T) (v1 netlink.Link) {
	t.Helper()
	namespace(t)
	// /sys shows the namespace of whoever mounts it.
	check(t, unix.Unshare(unix.CLONE_NEWNS))
	check(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	check(t, unix.Mount("sysfs", "/sys", "sysfs", 0, ""))
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "v0"
	check(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "v1"}))
	for _, name := range []string{"v0", "v1"} {
		check(t, netlink.LinkSetUp(byName(t, name)))
	}
	return byName(t, "v1")
}

func byName(t *testing.T, name string) netlink.Link {
	t.Helper()
	link, err := netlink.LinkByName(name)
	check(t, err)
	return link
}

// TestKernelWithoutMacvtap: what a kernel says of a kind of interface that it does not have is
// one clear line.
func TestKernelWithoutMacvtap(t *testing.T) {
	namespace(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "made"
	err := net.MakeError("made", "v0", netlink.LinkAdd(&netlink.GenericLink{LinkAttrs: attrs, LinkType: "govmm-no-such"}))
	if want := strings.TrimPrefix(noMacvtap, "macvtap v0: "); err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

const noMacvtap = `macvtap v0: this host's kernel has no macvtap (modprobe macvtap, or a kernel with CONFIG_MACVTAP)`

// needMacvtap skips the test where the kernel has none.
func needMacvtap(t *testing.T) {
	t.Helper()
	tap, err := net.OpenTap(options(t, "macvtap=v0"))
	if err != nil && err.Error() == noMacvtap {
		t.Skip("SKIPPED: the kernel has no macvtap; test/svm has")
	}
	check(t, err)
	check(t, tap.Close())
}

// TestMacvtapErrors: what is wrong has one line each, also where the kernel has no macvtap,
// and nothing stays.
func TestMacvtapErrors(t *testing.T) {
	cable(t)
	bridge(t, "br0")
	check(t, netlink.LinkSetMaster(byName(t, "v1"), byName(t, "br0")))
	for words, want := range map[string]string{
		"macvtap=v1,name=made": "macvtap v1: make made: device or resource busy (is v1 a port of a bridge, or of another interface?)",
		"macvtap=eth9":         "macvtap eth9: the host has no interface of that name (ip -br link lists them)",
		"macvtap=v0,mtu=9000":  "macvtap v0: expected an MTU of at least 9000 at v0, found 1500",
		"macvtap=v0,name=v1":   "macvtap v0: make v1: an interface of that name exists already (macvtap=v1 uses it, if it is a macvtap)",
		"macvtap=lo,name=made": "macvtap lo: make made: invalid argument (lo is of a kind that can have none)",
	} {
		_, err := net.OpenTap(options(t, words))
		none := strings.Replace(noMacvtap, "v0", strings.Split(words[8:], ",")[0], 1)
		if err == nil || err.Error() != want && err.Error() != none {
			t.Errorf("%s: %v, want %s", words, err, want)
		}
	}
	links, err := netlink.LinkList()
	check(t, err)
	for _, l := range links {
		if l.Type() == "macvtap" {
			t.Errorf("%s is there", l.Attrs().Name)
		}
	}
	o := options(t, "macvtap=v0")
	o.Arriving = true
	if _, err := net.OpenTap(o); err == nil || !strings.Contains(err.Error(), "give --net macvtap=LINK here") {
		t.Errorf("a source names it: %v", err)
	}
}

// TestMacvtap: frames pass both ways once it is taken, with all queues; it is down before and
// after, so that another one with the guest's address can be up; and it is gone at the end.
func TestMacvtap(t *testing.T) {
	v1 := cable(t)
	needMacvtap(t)
	a, err := net.OpenTap(options(t, "macvtap=v0,mac=52:54:00:01:02:03,mtu=1400,queues=3"))
	check(t, err)
	b, err := net.OpenTap(options(t, "macvtap=v0,name=second,mac=52:54:00:01:02:03"))
	check(t, err)
	if a.Interface() != "govmm0" || b.Interface() != "second" || a.MTU() != 1400 || b.MTU() != 1500 || a.Offloads()&net.FeatureHostTSO4 == 0 {
		t.Errorf("they are %s, MTU %d, offloads %#x and %s, MTU %d", a.Interface(), a.MTU(), a.Offloads(), b.Interface(), b.MTU())
	}
	for _, name := range []string{"govmm0", "second"} {
		link := byName(t, name)
		if l := link.Attrs(); l.RawFlags&unix.IFF_UP != 0 || l.RawFlags&unix.IFF_ALLMULTI == 0 || l.HardwareAddr.String() != guestMAC.String() || l.ParentIndex != byName(t, "v0").Attrs().Index ||
			link.(*netlink.Macvtap).Mode != netlink.MACVLAN_MODE_BRIDGE {
			t.Errorf("%s before it is taken: %+v", name, l)
		}
	}
	host := listen(t, v1)
	early := ethernet(guestMAC, net.MAC{2, 0, 0, 0, 0, 1}, 100)
	for range 50 {
		_, err := unix.Write(host, early)
		check(t, err)
	}
	t.Cleanup(func() { // after the rigs have closed them
		for _, name := range []string{"govmm0", "second"} {
			if _, err := netlink.LinkByName(name); err == nil {
				t.Errorf("%s is there", name)
			}
		}
	})
	rigs := map[*net.Tap]*rig{}
	for _, tap := range []*net.Tap{a, b} {
		pairs := len(tap.Ports())
		rigs[tap] = newRigOn(t, tap, nil, pairs, plain|tap.Offloads()|net.FeatureMultiQueue)
		if got := rigs[tap].command(4, 0, byte(pairs), 0); got != 0 {
			t.Fatalf("%d pairs: answer %d", pairs, got)
		}
		for i := range 20 * pairs {
			rigs[tap].add(2*(i%pairs), nil, []virtiotest.Buffer{{GPA: rigs[tap].data + 4096 + uint64(i)*2048, Len: 2048}})
		}
	}
	for turn := range 2 {
		for tap, other := range map[*net.Tap]*net.Tap{a: b, b: a} {
			check(t, tap.Take())
			check(t, tap.Take())
			if err := other.Take(); err == nil || !strings.Contains(err.Error(), "address already in use (v0, or another interface on it, has the guest's address)") {
				t.Errorf("both are up: %v", err)
			}
			r := rigs[tap]
			for pair := range tap.Ports() {
				out := ethernet(broadcast, guestMAC, 200+10*turn+pair)
				r.send(pair, append(make([]byte, net.HeaderBytes), out...))
				expect(t, host, out)
			}
			in := ethernet(guestMAC, net.MAC{2, 0, 0, 0, 0, 1}, 300)
			_, err := unix.Write(host, in)
			check(t, err)
			for n := 0; n != 300; {
				if n = r.someFrame(len(tap.Ports())); n == 100 {
					t.Fatalf("%s: a frame from before comes late", tap.Interface())
				}
			}
			check(t, r.d.Pause(ctx(t)))
			check(t, tap.Yield())
			if byName(t, tap.Interface()).Attrs().RawFlags&unix.IFF_UP != 0 {
				t.Errorf("%s is up", tap.Interface())
			}
			check(t, r.d.Resume())
		}
	}
	check(t, a.Take())
}

// someFrame waits for a frame to the guest by any of its queue pairs, and returns its length.
func (r *rig) someFrame(pairs int) int {
	r.t.Helper()
	for limit := time.Now().Add(testenv.Patience); time.Now().Before(limit); time.Sleep(time.Millisecond) {
		for pair := range pairs {
			if u, ok := r.drivers[2*pair].Used(); ok {
				return int(u.Len) - net.HeaderBytes
			}
		}
	}
	r.t.Fatal("no frame comes")
	return 0
}

// TestMacvtapArrives: what a receiver has opened serves one guest after the other that comes
// and does not stay; the address and what is promised are the guest's.
func TestMacvtapArrives(t *testing.T) {
	cable(t)
	needMacvtap(t)
	o, err := net.ParseHostOptions("macvtap=v0,name=here")
	check(t, err)
	here := &net.Spec{Options: o}
	check(t, here.Prepare(true)) // a process that takes over gets what is open
	if _, err := netlink.LinkByName("here"); err == nil {
		t.Fatal("it is made for a guest that brings one")
	}
	check(t, here.Prepare(false))
	t.Cleanup(func() { check(t, netlink.LinkDel(byName(t, "here"))) })
	for i, mtu := range []uint16{1500, 1400, 9000} {
		o := options(t, fmt.Sprintf("tap=there,mac=52:54:00:01:02:0%d,mtu=%d,queues=%d", i+1, mtu, i+1))
		s := &net.Spec{Options: o}
		check(t, s.Move(here))
		b, err := s.Open(slog.New(slog.DiscardHandler))
		if mtu == 9000 {
			const want = "macvtap here: expected an MTU of 9000, as the guest was told, found 1500 (ip link set here mtu 9000, which v0 must have, too)"
			if err == nil || err.Error() != want {
				t.Errorf("%v, want %s", err, want)
			}
			continue
		}
		check(t, err)
		check(t, b.(virtio.Locker).Lock())
		l := byName(t, "here").Attrs()
		if l.HardwareAddr.String() != o.MAC.String() || l.RawFlags&unix.IFF_UP == 0 || l.MTU != 1500 {
			t.Errorf("when it is taken: %+v", l)
		}
		if got, want := strings.Join(b.Info().Lines(), "\n"), o.MAC.String()+", macvtap here on v0\n"; !strings.HasPrefix(got, want) {
			t.Errorf("%q", got)
		}
		check(t, b.(virtio.Locker).Unlock(ctx(t)))
		check(t, b.Close())
	}
}

// TestMacvtapThatIsThere: one that exists is used as it is and stays; two processes do not.
func TestMacvtapThatIsThere(t *testing.T) {
	cable(t)
	needMacvtap(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.ParentIndex = "theirs", byName(t, "v0").Attrs().Index
	attrs.Index = 1<<20 - 1 // other network namespaces have no device of this number
	check(t, netlink.LinkAdd(&netlink.Macvtap{Macvlan: netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_VEPA}}))
	t.Cleanup(func() { check(t, netlink.LinkDel(byName(t, "theirs"))) })
	tap, err := net.OpenTap(options(t, "macvtap=theirs,mac=52:54:00:01:02:03,mtu=1300"))
	check(t, err)
	if _, err := net.OpenTap(options(t, "macvtap=theirs")); err == nil || err.Error() != "macvtap theirs: device or resource busy (another process uses it)" {
		t.Errorf("two use it: %v", err)
	}
	if _, err := net.OpenTap(options(t, "macvtap=theirs,name=x")); err == nil || !strings.Contains(err.Error(), "is a macvtap, which is used as it is") {
		t.Errorf("a name for one that has one: %v", err)
	}
	check(t, tap.Take())
	link := byName(t, "theirs")
	if l := link.Attrs(); l.HardwareAddr.String() != guestMAC.String() || l.MTU != 1300 || l.RawFlags&unix.IFF_UP == 0 || link.(*netlink.Macvtap).Mode != netlink.MACVLAN_MODE_VEPA {
		t.Errorf("when it is taken: %+v", l)
	}
	// The device of the same number is another interface's.
	check(t, tap.Close())
	node := fmt.Sprintf("/dev/tap%d", byName(t, "theirs").Attrs().Index)
	check(t, os.Rename(node, node+"-away"))

	if _, err := net.OpenTap(options(t, "macvtap=theirs")); err == nil || !strings.Contains(err.Error(), node+" does not exist (make it: mknod "+node+" c ") {
		t.Errorf("no device: %v", err)
	}
	check(t, unix.Mknod(node, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	if _, err := net.OpenTap(options(t, "macvtap=theirs")); err == nil || !strings.Contains(err.Error(), node+" is another one's: expected device ") {
		t.Errorf("another's device: %v", err)
	}
	check(t, os.Remove(node))
	check(t, os.Rename(node+"-away", node))
}

// TestMacvtapIsDeleted: the guest's link is down then, and nothing else happens.
func TestMacvtapIsDeleted(t *testing.T) {
	cable(t)
	needMacvtap(t)
	tap := openTap(t, "macvtap=v0,name=gone,mac=52:54:00:01:02:03,queues=2")
	r := newRigOn(t, tap, nil, 2, plain|tap.Offloads()|net.FeatureMultiQueue|net.FeatureStatus)
	tap.OnLink(r.d.SetLink)
	check(t, netlink.LinkDel(byName(t, "v1")))
	r.linkIs(false)
	r.send(0, append(make([]byte, net.HeaderBytes), ethernet(broadcast, guestMAC, 200)...))
	check(t, r.d.Pause(ctx(t)))
	check(t, tap.Yield())
	check(t, r.d.Resume())
}

// TestMacvtapIsInherited: another process goes on with it, and the one that made it does not
// take it away.
func TestMacvtapIsInherited(t *testing.T) {
	v1 := cable(t)
	needMacvtap(t)
	for _, fails := range []bool{true, false} {
		s := &net.Spec{Options: options(t, "macvtap=v0,name=ours,mac=52:54:00:01:02:03,queues=2")}
		open := func(files []*os.File) virtio.Backend {
			t.Helper()
			var b virtio.Backend
			var err error
			if files == nil {
				b, err = s.Open(slog.New(slog.DiscardHandler))
			} else {
				b, err = s.Inherit(files, slog.New(slog.DiscardHandler))
			}
			check(t, err)
			return b
		}
		from := open(nil)
		check(t, from.(virtio.Locker).Lock())
		fds, err := from.(virtio.Inheritable).Descriptors()
		check(t, err)
		var files []*os.File
		for _, fd := range fds {
			n, err := unix.Dup(int(fd))
			check(t, err)
			files = append(files, os.NewFile(uintptr(n), "inherited"))
		}
		to := open(files)
		if fails {
			check(t, to.Close())
			byName(t, "ours")
			check(t, from.Close())
			for limit := time.Now().Add(testenv.Patience); time.Now().Before(limit); time.Sleep(time.Millisecond) {
				if _, err := netlink.LinkByName("ours"); err != nil {
					break // the process that keeps it has seen the end
				}
			}
			continue
		}
		check(t, to.(virtio.Locker).Lock())
		check(t, from.Close())
		d, err := to.Attach(virtio.Guest{})
		check(t, err)
		t.Cleanup(func() { // after the rig has closed it
			if _, err := netlink.LinkByName("ours"); err == nil {
				t.Error("it is there")
			}
		})
		host := listen(t, v1)
		r := newRigOf(t, d.(*net.Device), plain)
		out := ethernet(broadcast, guestMAC, 222)
		r.send(0, append(make([]byte, net.HeaderBytes), out...))
		expect(t, host, out)
		if got := strings.Join(to.Info().Lines(), "\n"); !strings.Contains(got, "macvtap ours on v0") {
			t.Errorf("%q", got)
		}
	}
}

// TestOneMAC: a guest whose backend gets the frames to one address only cannot take another.
func TestOneMAC(t *testing.T) {
	w := newWire(t, 1)
	r := newRigWith(t, net.Config{Backend: w, MAC: guestMAC, OneMAC: true}, w, 1, plain|net.FeatureCtrlMACAddr)
	if a := r.command(1, 1, 0x52, 0x54, 0, 9, 9, 9); a != 1 || r.d.MAC() != guestMAC {
		t.Errorf("answer %d, it is %s", a, r.d.MAC())
	}
	if a := r.command(1, 1, guestMAC[:]...); a != 0 {
		t.Errorf("its own: answer %d", a)
	}
	other := newWire(t, 1)
	d, err := net.New(net.Config{Backend: other, MAC: net.MAC{2, 0, 0, 0, 0, 9}})
	check(t, err)
	state, err := d.SaveState()
	check(t, err)
	if err := r.d.LoadState(state); err == nil || !bytes.Contains([]byte(err.Error()), []byte("which a macvtap does not allow")) {
		t.Errorf("it arrives with another: %v", err)
	}
}
