package usernet

import (
	"context"
	"encoding/binary"
	"io"
	stdnet "net"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/netproc"
	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/virtio/net"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

var check = testenv.Check

// allOffloads are what Linux's driver accepts.
const allOffloads = net.FeatureGuestCsum | net.FeatureGuestTSO4 | net.FeatureGuestTSO6 | net.FeatureGuestECN

var testMAC = net.MAC{0x52, 0x54, 0, 1, 2, 3}

// rig is a network with a guest, which is a stack of its own.
type rig struct {
	t     testing.TB
	n     *Network
	link  *endpoint    // the guest's
	guest *stack.Stack // its stack
	ended chan error   // of the network
}

// sockets is a pair of stream sockets.
func sockets(t testing.TB) (a, b *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	a, b = os.NewFile(uintptr(fds[0]), "a"), os.NewFile(uintptr(fds[1]), "b")
	t.Cleanup(func() { _, _ = a.Close(), b.Close() })
	return a, b
}

func newRig(t testing.TB, cfg Config, mtu uint16, offloads uint64) *rig {
	t.Helper()
	return newRigBehind(t, cfg, mtu, offloads, func(c *os.File) *os.File { return c })
}

// newRigBehind is newRig with a guest that is not joined to the network itself, but to what
// join makes of the network's end.
func newRigBehind(t testing.TB, cfg Config, mtu uint16, offloads uint64, join func(*os.File) *os.File) *rig {
	t.Helper()
	ours, theirs := sockets(t)
	n, err := New(cfg, mtu, testMAC, ours)
	check(t, err)
	r := &rig{t: t, n: n, ended: make(chan error, 1)}
	go func() { r.ended <- n.Run() }()
	t.Cleanup(func() {
		check(t, n.unlisten())
		_ = theirs.Close()
		<-r.ended
		n.stack.Close()
	})
	check(t, n.Do(netproc.Request{MTU: mtu, Offloads: offloads}))
	r.attach(join(theirs), mtu, offloads)
	return r
}

// cable joins a guest to a network, and to another one after a move.
type cable struct {
	t     testing.TB
	mu    sync.Mutex
	guest *os.File
	to    *os.File // the network's end
}

// join returns the guest's end.
func (c *cable) join(network *os.File) *os.File {
	ours, theirs := sockets(c.t)
	c.guest = ours
	go c.carry(ours, func() *os.File { return c.to })
	c.move(network)
	return theirs
}

// move joins the guest to a network.
func (c *cable) move(network *os.File) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.to = network
	go c.carry(network, func() *os.File { return c.guest })
}

// carry carries whole frames until an end is closed.
func (c *cable) carry(from *os.File, to func() *os.File) {
	for {
		b := make([]byte, 4)
		if _, err := io.ReadFull(from, b); err != nil {
			return
		}
		b = append(b, make([]byte, binary.BigEndian.Uint32(b))...)
		if _, err := io.ReadFull(from, b[4:]); err != nil {
			return
		}
		c.mu.Lock()
		_, err := to().Write(b)
		c.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// attach makes the guest's stack. It accepts offloads, and its own frames are never cut.
func (r *rig) attach(c netproc.Conn, mtu uint16, offloads uint64) {
	r.t.Helper()
	in, err := netproc.NewReader(c, headerBytes+etherHeader, headerBytes+maxFrame)
	check(r.t, err)
	out, err := netproc.NewWriter(c, maxWaiting)
	check(r.t, err)
	r.link = &endpoint{mtu: uint32(mtu), mac: testMAC, in: in, out: out, apart: true}
	r.link.guest.Store(allOffloads)
	r.link.accept = func(frame []byte) bool {
		if offloads&net.FeatureGuestTSO4 == 0 && len(frame) > int(mtu)+etherHeader {
			r.t.Errorf("a frame of %d bytes, which the guest did not negotiate", len(frame))
		}
		return true
	}
	r.guest, err = newStack(r.link, guestIP, subnet)
	check(r.t, err)
	table := r.guest.GetRouteTable()
	r.guest.SetRouteTable(append(table, tcpip.Route{Destination: everything, Gateway: tcpip.AddrFrom4(gatewayIP.As4()), NIC: nic}))
	ended := make(chan struct{})
	link := r.link
	go func() { _ = link.run(); close(ended) }()
	guest := r.guest
	r.t.Cleanup(func() {
		if f, ok := c.(*os.File); ok {
			_ = f.Close()
		}
		<-ended
		guest.Close()
	})
}

var everything = func() tcpip.Subnet {
	s, err := tcpip.NewSubnet(tcpip.AddrFrom4([4]byte{}), tcpip.MaskFromBytes(make([]byte, 4)))
	if err != nil {
		panic(err)
	}
	return s
}()

// dial has the guest connect.
func (r *rig) dial(to netip.AddrPort) (*gonet.TCPConn, error) {
	c, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return gonet.DialContextTCP(c, r.guest, full(to.Addr(), to.Port()), ipv4.ProtocolNumber)
}

// udp has the guest bind a port; 0: any.
func (r *rig) udp(port uint16) *gonet.UDPConn {
	r.t.Helper()
	local := full(guestIP, port)
	c, err := gonet.DialUDP(r.guest, &local, nil, ipv4.ProtocolNumber)
	check(r.t, err)
	r.t.Cleanup(func() { _ = c.Close() })
	check(r.t, c.SetDeadline(time.Now().Add(20*time.Second)))
	return c
}

// here is an address of this host that is not a loopback one.
func here(t testing.TB) netip.Addr {
	t.Helper()
	addrs, err := stdnet.InterfaceAddrs()
	check(t, err)
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() && !p.Addr().IsLoopback() && !p.Addr().IsLinkLocalUnicast() {
			return p.Addr()
		}
	}
	// This host has none: it gets one of those for documentation (RFC 5737).
	const own = "198.51.100.77"
	if out, err := exec.Command("ip", "addr", "add", own+"/32", "dev", "lo").CombinedOutput(); err != nil {
		t.Fatalf("give this host an address: %v: %s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("ip", "addr", "del", own+"/32", "dev", "lo").Run() })
	return netip.MustParseAddr(own)
}

// listen listens at an address of this host and serves each connection with f.
func listen(t testing.TB, a netip.Addr, f func(*stdnet.TCPConn)) netip.AddrPort {
	t.Helper()
	ln, err := stdnet.Listen("tcp", netip.AddrPortFrom(a, 0).String())
	check(t, err)
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go f(c.(*stdnet.TCPConn))
		}
	}()
	return netip.MustParseAddrPort(ln.Addr().String())
}

// free is a TCP port of this host that nobody has.
func free(t testing.TB, a netip.Addr) netip.AddrPort {
	t.Helper()
	ln, err := stdnet.Listen("tcp", netip.AddrPortFrom(a, 0).String())
	check(t, err)
	defer ln.Close()
	return netip.MustParseAddrPort(ln.Addr().String())
}
