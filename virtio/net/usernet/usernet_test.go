package usernet

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	stdnet "net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/netproc"
	"github.com/govmm/govmm/virtio/net"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

func config(forwards ...net.Forward) Config {
	return Config{UserNetConfig: net.UserNetConfig{UserNet: net.UserNet{Forwards: forwards}}}
}

// pattern is n bytes that differ.
func pattern(n int) []byte {
	p := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(p)
	return p
}

// echo sends back what it gets, to the end.
func echo(c *stdnet.TCPConn) {
	defer c.Close()
	_, _ = io.Copy(c, c)
}

// TestTCP moves more than any buffer holds out and back, for guests with all, some and no
// offloads and with small and large MTUs.
func TestTCP(t *testing.T) {
	for _, c := range []struct {
		name     string
		mtu      uint16
		offloads uint64
	}{
		{"all offloads", 1500, allOffloads},
		{"checksums only", 1500, net.FeatureGuestCsum},
		{"none", 1500, 0},
		{"none, small MTU", 1280, 0},
		{"all, MTU 65520", 65520, allOffloads},
		{"none, MTU 65520", 65520, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, config(), c.mtu, c.offloads)
			to := listen(t, here(t), echo)
			conn, err := r.dial(to)
			check(t, err)
			want := pattern(6<<20 + 7)
			go func() {
				_, _ = conn.Write(want)
				_ = conn.CloseWrite()
			}()
			check(t, conn.SetDeadline(time.Now().Add(60*time.Second)))
			got, err := io.ReadAll(conn)
			check(t, err)
			if sha256.Sum256(got) != sha256.Sum256(want) {
				t.Errorf("got %d bytes back, expected the %d that were sent", len(got), len(want))
			}
		})
	}
}

// TestRefused: what nobody answers is refused at once, and so is what the guest may not reach.
func TestRefused(t *testing.T) {
	loopback := listen(t, netip.MustParseAddr("127.0.0.1"), echo)
	r := newRig(t, config(), 1500, allOffloads)
	for _, to := range []netip.AddrPort{
		free(t, here(t)),
		loopback,
		netip.AddrPortFrom(gatewayIP, loopback.Port()),
		netip.AddrPortFrom(hostIP, loopback.Port()),
		netip.MustParseAddrPort("0.0.0.0:80"),
		netip.MustParseAddrPort("169.254.169.254:80"),
		netip.MustParseAddrPort("127.1.2.3:80"),
		netip.AddrPortFrom(gatewayIP, 80),
	} {
		if c, err := r.dial(to); err == nil {
			t.Errorf("%s: connected", to)
			_ = c.Close()
		}
	}
	// With host the loopback address is at one of the network's.
	cfg := config()
	cfg.Host = true
	r = newRig(t, cfg, 1500, allOffloads)
	c, err := r.dial(netip.AddrPortFrom(hostIP, loopback.Port()))
	check(t, err)
	check(t, c.Close())
	if _, err := r.dial(loopback); err == nil {
		t.Error("connected to 127.0.0.1 by its own name")
	}
}

// TestResets: an end that is not in order is told to the other side as such.
func TestResets(t *testing.T) {
	r := newRig(t, config(), 1500, allOffloads)
	accepted := make(chan *stdnet.TCPConn, 4)
	to := listen(t, here(t), func(c *stdnet.TCPConn) { accepted <- c })
	conn, err := r.dial(to)
	check(t, err)
	host := <-accepted
	check(t, host.SetLinger(0))
	check(t, host.Close())
	check(t, conn.SetDeadline(time.Now().Add(20*time.Second)))
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) || !strings.Contains(err.Error(), "reset") {
		t.Errorf("the guest reads %v, expected a reset", err)
	}
}

// TestForward: ports of the host lead to the guest while they are taken.
func TestForward(t *testing.T) {
	at := free(t, netip.MustParseAddr("127.0.0.1"))
	f := net.Forward{Host: at, Guest: 22}
	r := newRig(t, config(f), 1500, allOffloads)
	if _, err := stdnet.Dial("tcp", at.String()); err == nil {
		t.Fatal("the port is taken before it is asked for")
	}
	ln, err := gonet.ListenTCP(r.guest, full(guestIP, 22), ipv4.ProtocolNumber)
	check(t, err)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); _ = c.Close() }()
		}
	}()
	defer ln.Close()
	check(t, r.n.Do(netproc.Request{MTU: 1500, Offloads: allOffloads, Taken: true}))
	check(t, r.n.Do(netproc.Request{MTU: 1500, Offloads: allOffloads, Taken: true}))
	c, err := stdnet.Dial("tcp", at.String())
	check(t, err)
	want := pattern(2 << 20)
	go func() {
		_, _ = c.Write(want)
		_ = c.(*stdnet.TCPConn).CloseWrite()
	}()
	check(t, c.SetDeadline(time.Now().Add(60*time.Second)))
	got, err := io.ReadAll(c)
	check(t, err)
	if !bytes.Equal(got, want) {
		t.Errorf("got %d bytes back, expected the %d that were sent", len(got), len(want))
	}

	// Somebody else has the port.
	other, err := New(config(f), 1500, testMAC, func() netproc.Conn { a, _ := sockets(t); return a }())
	check(t, err)
	if err := other.listen(); err == nil || err.Error() != "forward="+at.String()+":22: take port "+at.String()[len("127.0.0.1:"):]+" of this host: address already in use" {
		t.Errorf("take a port that is taken: %v", err)
	}
	// A connection outlives the port, as when the guest may come back.
	c, err = stdnet.Dial("tcp", at.String())
	check(t, err)
	_, err = c.Write([]byte("a"))
	check(t, err)
	_, err = c.Read(make([]byte, 1))
	check(t, err)
	check(t, r.n.Do(netproc.Request{MTU: 1500, Offloads: allOffloads}))
	if _, err := stdnet.Dial("tcp", at.String()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the port was given back: %v", err)
	}
	_, err = c.Write([]byte("b"))
	check(t, err)
	if n, err := c.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Errorf("the connection: %d, %v", n, err)
	}
	check(t, c.Close())
	// Nobody in the guest listens.
	check(t, other.listen())
	check(t, other.unlisten())
}

// TestMove: after a move the guest's connections are unknown to the network, and it says so with
// the next segment. The address and the gateway are the same.
func TestMove(t *testing.T) {
	to := listen(t, here(t), echo)
	c := &cable{t: t}
	r := newRigBehind(t, config(), 1500, allOffloads, c.join)
	conn, err := r.dial(to)
	check(t, err)
	_, err = conn.Write([]byte("x"))
	check(t, err)
	_, err = conn.Read(make([]byte, 1))
	check(t, err)

	// The guest goes on with its stack at another network.
	ours, theirs := sockets(t)
	n, err := New(config(), 1500, testMAC, ours)
	check(t, err)
	go func() { _ = n.Run() }()
	c.move(theirs)
	begin := time.Now()
	_, err = conn.Write([]byte("y"))
	check(t, err)
	check(t, conn.SetDeadline(time.Now().Add(20*time.Second)))
	if _, err := conn.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "reset") {
		t.Errorf("the guest reads %v, expected a reset", err)
	}
	t.Logf("reset after %v", time.Since(begin))
	again, err := r.dial(to)
	check(t, err)
	_, err = again.Write([]byte("z"))
	check(t, err)
	if n, err := again.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Errorf("a new connection: %d, %v", n, err)
	}
}

// TestLimits: connections beyond the limit are refused, and others go on.
func TestLimits(t *testing.T) {
	r := newRig(t, config(), 1500, allOffloads)
	r.n.connections.most.Store(3)
	to := listen(t, here(t), echo)
	for range 3 {
		c, err := r.dial(to)
		check(t, err)
		defer c.Close()
	}
	if _, err := r.dial(to); err == nil {
		t.Error("a connection beyond the limit")
	}
}

// TestRestart: the guest's stack talks to a network whose other end goes away.
func TestStreamEnds(t *testing.T) {
	ours, theirs := sockets(t)
	n, err := New(config(), 1500, testMAC, ours)
	check(t, err)
	ended := make(chan error, 1)
	go func() { ended <- n.Run() }()
	check(t, theirs.Close())
	if err := <-ended; !errors.Is(err, netproc.ErrEnd) {
		t.Errorf("run: %v, expected %v", err, netproc.ErrEnd)
	}
}

var _ stack.LinkEndpoint = (*endpoint)(nil)
