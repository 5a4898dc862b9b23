package net_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/virtiotest"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// namespace moves the test's thread into a network namespace of its own, which
// ends with it.
func namespace(t *testing.T) {
	t.Helper()
	testenv.NeedRoot(t, "network namespaces and taps")
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("SKIPPED: no /dev/net/tun")
	}
	runtime.LockOSThread() // and never unlocked: the thread ends with the test
	check(t, unix.Unshare(unix.CLONE_NEWNET))
}

func bridge(t *testing.T, name string) netlink.Link {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	link := &netlink.Bridge{LinkAttrs: attrs}
	check(t, netlink.LinkAdd(link))
	check(t, netlink.LinkSetUp(link))
	return link
}

func options(t *testing.T, s string) net.Options {
	t.Helper()
	o, err := net.ParseOptions(s)
	check(t, err)
	return o
}

func openTap(t *testing.T, s string) *net.Tap {
	t.Helper()
	tap, err := net.OpenTap(options(t, s))
	check(t, err)
	check(t, tap.Take())
	return tap
}

// listen opens a packet socket on an interface: the host's view of it.
func listen(t *testing.T, link netlink.Link) int {
	t.Helper()
	const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL<<8&0xff00
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all)
	check(t, err)
	t.Cleanup(func() { _ = unix.Close(fd) })
	check(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Attrs().Index}))
	check(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}))
	return fd
}

// expect reads from a packet socket until the frame comes. Hosts talk by
// themselves, too.
func expect(t *testing.T, fd int, want []byte) {
	t.Helper()
	p := make([]byte, 1<<17)
	for {
		n, err := unix.Read(fd, p)
		if err != nil {
			t.Fatalf("the frame does not come: %v", err)
		}
		if bytes.Equal(p[:n], want) {
			return
		}
	}
}

// ethernet makes a frame that a bridge forwards.
func ethernet(to, from net.MAC, n int) []byte {
	p := frame(n)[net.HeaderBytes:]
	copy(p, to[:])
	copy(p[6:], from[:])
	p[12], p[13] = 0x88, 0xb5 // local experiments
	return p
}

var broadcast = net.MAC{255, 255, 255, 255, 255, 255}

func TestTap(t *testing.T) {
	namespace(t)
	br := bridge(t, "br0")
	tap := openTap(t, "tap=tap0,bridge=br0,mac=52:54:00:01:02:03,mtu=1400")
	link, err := netlink.LinkByName("tap0")
	check(t, err)
	a := link.Attrs()
	if a.MTU != 1400 || tap.MTU() != 1400 || a.MasterIndex != br.Attrs().Index || a.Flags&1 == 0 || a.HardwareAddr.String() != "fe:54:00:01:02:03" {
		t.Errorf("the tap is %+v", a)
	}
	if tap.Offloads()&net.FeatureHostTSO4 == 0 || tap.Interface() != "tap0" {
		t.Errorf("offloads %#x", tap.Offloads())
	}
	r := newRigOn(t, tap, nil, 1, plain|tap.Offloads())
	host := listen(t, br)

	// Out by the tap, the bridge sees it; and the other way.
	out := ethernet(broadcast, guestMAC, 200)
	r.send(0, append(make([]byte, net.HeaderBytes), out...))
	expect(t, host, out)
	r.add(0, nil, []virtiotest.Buffer{{GPA: r.data, Len: 2000}})
	in := ethernet(guestMAC, net.MAC{2, 0, 0, 0, 0, 1}, 300)
	side := listen(t, link)
	for received := false; !received; {
		_, err := unix.Write(side, in)
		check(t, err)
		u := r.next(0)
		received = bytes.Equal(r.bytes(r.data+net.HeaderBytes, uint64(u.Len)-net.HeaderBytes), in)
		if !received { // the host's own
			r.add(0, nil, []virtiotest.Buffer{{GPA: r.data, Len: 2000}})
		}
	}
	// The bridge learns where the guest is, and so it does from an announcement.
	r.d.Announce()
	rarp := append([]byte(nil), broadcast[:]...)
	rarp = append(append(rarp, guestMAC[:]...), 0x80, 0x35)
	for p := make([]byte, 2000); ; {
		n, err := unix.Read(host, p)
		if err != nil {
			t.Fatalf("no announcement: %v", err)
		}
		if bytes.HasPrefix(p[:n], rarp) {
			break
		}
	}
	neighbours, err := netlink.NeighList(a.Index, unix.AF_BRIDGE)
	check(t, err)
	learnt := false
	for _, n := range neighbours {
		learnt = learnt || n.HardwareAddr.String() == guestMAC.String()
	}
	if !learnt {
		t.Error("the bridge does not know where the guest is")
	}
}

// The kernel takes what the guest wants to have segmented, and cuts it.
func TestTapSegments(t *testing.T) {
	namespace(t)
	tap := openTap(t, "tap=tap0,mac=52:54:00:01:02:03")
	r := newRigOn(t, tap, nil, 1, plain|tap.Offloads())
	p := make([]byte, net.HeaderBytes+54+4000)
	copy(p, []byte{1, 1, 54, 0, 0xe8, 3, 34, 0, 16, 0}) // checksum, TCP/IPv4, 54 bytes of headers, by 1000
	e := p[net.HeaderBytes:]
	copy(e, broadcast[:])
	copy(e[6:], guestMAC[:])
	copy(e[12:], []byte{8, 0, 0x45, 0, 0x0f, 0xc8, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2})
	copy(e[34:], []byte{0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 0xff, 0xff})
	r.send(0, p)
	if n := r.d.Counters(); n.TxFrames != 1 || n.TxDropped != 0 {
		t.Errorf("counted %+v", n)
	}
}

func TestTapQueues(t *testing.T) {
	namespace(t)
	tap := openTap(t, "tap,mac=52:54:00:01:02:03,queues=3")
	if tap.Interface() != "govmm0" {
		t.Errorf("it is called %s", tap.Interface())
	}
	r := newRigOn(t, tap, nil, 3, plain|tap.Offloads()|net.FeatureMultiQueue)
	link, err := netlink.LinkByName("govmm0")
	check(t, err)
	host := listen(t, link)
	for _, n := range []byte{3, 1, 2, 3} {
		if a := r.command(4, 0, n, 0); a != 0 {
			t.Fatalf("%d pairs: answer %d", n, a)
		}
		for pair := range int(n) {
			out := ethernet(broadcast, guestMAC, 100+10*pair)
			r.send(pair, append(make([]byte, net.HeaderBytes), out...))
			expect(t, host, out)
		}
	}
	check(t, r.d.Pause(ctx(t)))
	check(t, r.d.Resume())
	if len(r.logged) > 0 {
		t.Error(<-r.logged)
	}
}

// A tap that another one made stays as it is, and stays.
func TestTapThatIsThere(t *testing.T) {
	namespace(t)
	for _, flags := range []netlink.TuntapFlag{netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR, netlink.TUNTAP_MULTI_QUEUE_DEFAULTS} {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "ours"
		made := &netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP, Flags: flags, Owner: 1234, Queues: 1}
		check(t, netlink.LinkAdd(made))
		for _, f := range made.Fds {
			check(t, f.Close())
		}
		tap := openTap(t, "tap=ours")
		if _, err := net.OpenTap(options(t, "tap=ours")); flags&netlink.TUNTAP_MULTI_QUEUE == 0 && !errors.Is(err, unix.EBUSY) {
			t.Errorf("a tap that is taken: %v", err)
		}
		check(t, tap.Close())
		link, err := netlink.LinkByName("ours")
		check(t, err)
		if link.(*netlink.Tuntap).Owner != 1234 {
			t.Error("it has another owner")
		}
		check(t, netlink.LinkDel(link))
	}
	tap := openTap(t, "tap=stays,owner=4321")
	check(t, tap.Close())
	link, err := netlink.LinkByName("stays")
	check(t, err)
	if link.(*netlink.Tuntap).Owner != 4321 {
		t.Error("it has another owner")
	}
	tap = openTap(t, "tap=goes")
	check(t, tap.Close())
	if _, err := netlink.LinkByName("goes"); err == nil {
		t.Error("a tap that was made here stays")
	}
}

func TestTapErrors(t *testing.T) {
	namespace(t)
	bridge(t, "br0")
	openTap(t, "tap=tap0")
	for s, want := range map[string]string{
		"tap=br0":              "is not a tap",
		"tap=t1,bridge=absent": "bridge absent does not exist",
		"tap=t1,bridge=tap0":   "tap0 is not a bridge",
		"tap=tap0":             "another process uses it",
		"tap=tap0,queues=2":    "expected one that can have 2 queues, found one with a single queue (it was made without multi_queue)",
	} {
		tap, err := net.OpenTap(options(t, s))
		if err == nil {
			check(t, tap.Close())
		}
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want one line with %q", s, err, want)
		}
	}
	if _, err := netlink.LinkByName("t1"); err == nil {
		t.Error("a tap is left behind")
	}
}

// The error for a user without CAP_NET_ADMIN says what is needed.
func TestTapWithoutPrivilege(t *testing.T) {
	if os.Getenv("GOVMM_TEST_TAP") != "" {
		_, err := net.OpenTap(options(t, "tap=tap0"))
		if err == nil || !strings.Contains(err.Error(), "CAP_NET_ADMIN") || strings.Contains(err.Error(), "\n") {
			t.Errorf("told: %v", err)
		}
		return
	}
	namespace(t)
	check(t, os.Chmod(t.TempDir(), 0o755))
	exe, err := os.Executable()
	check(t, err)
	// The binary is where others cannot go: it is handed over open.
	f, err := os.Open(exe)
	check(t, err)
	defer func() { check(t, f.Close()) }()
	cmd := exec.Command("/proc/self/fd/3", "-test.run=^TestTapWithoutPrivilege$")
	cmd.ExtraFiles = []*os.File{f}
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "GOVMM_TEST_TAP=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// A tap that goes away while it is used takes the link down, and says so once.
func TestTapDies(t *testing.T) {
	namespace(t)
	tap := openTap(t, "tap=tap0,queues=2")
	r := newRigOn(t, tap, nil, 2, plain|net.FeatureMultiQueue)
	if a := r.command(4, 0, 2, 0); a != 0 {
		t.Fatal("no pairs")
	}
	link, err := netlink.LinkByName("tap0")
	check(t, err)
	check(t, netlink.LinkDel(link))
	select {
	case <-r.changed:
	case <-time.After(10 * time.Second):
		t.Fatal("nobody notices")
	}
	r.send(0, frame(60))
	if r.status() != 0 || len(r.logged) != 1 {
		t.Errorf("status %d, %d lines", r.status(), len(r.logged))
	}
	check(t, r.d.Pause(ctx(t)))
	check(t, r.d.Resume())
	r.d.Reset()
	if r.status() != 0 {
		t.Error("the next driver finds a link that is up")
	}
}
