package usernet

import (
	"bytes"
	"encoding/binary"
	"io"
	stdnet "net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/netproc"
	"github.com/govmm/govmm/virtio/net"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// message is a message of a DHCP client, with options behind its type.
func message(kind byte, options ...byte) []byte {
	m := make([]byte, 236, 300)
	m[0], m[1], m[2] = 1, 1, 6
	copy(m[4:], "xid!")
	copy(m[28:], testMAC[:])
	m = binary.BigEndian.AppendUint32(m, 0x63825363)
	return append(append(append(m, 53, 1, kind), options...), 255)
}

// option returns a DHCP option of a frame.
func option(t *testing.T, frame []byte, code byte) []byte {
	t.Helper()
	for o := frame[42+240:]; len(o) > 1 && o[0] != 255; o = o[2+o[1]:] {
		if o[0] == code {
			return o[2 : 2+o[1]]
		}
	}
	return nil
}

func TestDHCP(t *testing.T) {
	r := newRig(t, config(), 1400, 0)
	for _, c := range []struct {
		name    string
		message []byte
		answer  byte
	}{
		{"discover", message(1), 2},
		{"request", message(3, 50, 4, 192, 168, 127, 2, 54, 4, 192, 168, 127, 1), 5},
		{"request of another server's", message(3, 50, 4, 192, 168, 127, 2, 54, 4, 192, 168, 127, 9), 0},
		{"request of another address", message(3, 50, 4, 10, 0, 0, 5), 6},
		{"inform", message(8), 5},
		{"release", message(7), 0},
		{"without options", message(1)[:240], 0},
		{"an option that is cut off", append(message(1)[:243], 12, 200, 1), 0},
		{"short", message(1)[:100], 0},
	} {
		f := r.n.dhcp(c.message)
		if c.answer == 0 {
			if f != nil {
				t.Errorf("%s: an answer", c.name)
			}
			continue
		}
		if f == nil {
			t.Errorf("%s: no answer", c.name)
			continue
		}
		ip := header.IPv4(f[14:])
		u := header.UDP(ip.Payload())
		if ip.CalculateChecksum() != 0xffff || !u.IsChecksumValid(ip.SourceAddress(), ip.DestinationAddress(), payloadSum(u)) {
			t.Errorf("%s: a wrong checksum", c.name)
		}
		if got := option(t, f, 53); !bytes.Equal(got, []byte{c.answer}) {
			t.Errorf("%s: answer of type %d, expected %d", c.name, got, c.answer)
		}
		if mtu := option(t, f, 26); c.answer != 6 && (!bytes.Equal(mtu, []byte{1400 >> 8, 1400 & 255}) || !bytes.Equal(option(t, f, 3), gatewayIP.AsSlice()) || !bytes.Equal(option(t, f, 6), gatewayIP.AsSlice())) {
			t.Errorf("%s: options % x", c.name, f[42+240:])
		}
	}
}

func payloadSum(u header.UDP) uint16 {
	var sum uint32
	p := u.Payload()
	for i := 0; i+1 < len(p); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	if len(p)%2 == 1 {
		sum += uint32(p[len(p)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

// udpEcho answers datagrams at an address of this host.
func udpEcho(t *testing.T, a netip.Addr) netip.AddrPort {
	t.Helper()
	c, err := stdnet.ListenUDP("udp", stdnet.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 0)))
	check(t, err)
	t.Cleanup(func() { _ = c.Close() })
	go func() {
		p := make([]byte, 65536)
		for {
			n, from, err := c.ReadFromUDPAddrPort(p)
			if err != nil {
				return
			}
			_, _ = c.WriteToUDPAddrPort(p[:n], from)
		}
	}()
	return c.LocalAddr().(*stdnet.UDPAddr).AddrPort()
}

func TestUDP(t *testing.T) {
	one, two := udpEcho(t, here(t)), udpEcho(t, here(t))
	loopback := udpEcho(t, netip.MustParseAddr("127.0.0.1"))
	r := newRig(t, config(), 1500, allOffloads)
	c := r.udp(4000)
	// One port of the guest talks to two; the last is fragmented both ways.
	for _, to := range []netip.AddrPort{one, two, one} {
		for _, n := range []int{0, 1, 1400, 9000} {
			want := pattern(n)
			_, err := c.WriteTo(want, stdnet.UDPAddrFromAddrPort(to))
			check(t, err)
			p := make([]byte, 65536)
			got, from, err := c.ReadFrom(p)
			check(t, err)
			if !bytes.Equal(p[:got], want) || from.String() != to.String() {
				t.Errorf("got %d bytes from %s, expected %d from %s", got, from, n, to)
			}
		}
	}
	// Not these.
	_, err := c.WriteTo([]byte("x"), stdnet.UDPAddrFromAddrPort(netip.AddrPortFrom(hostIP, loopback.Port())))
	check(t, err)
	check(t, c.SetReadDeadline(time.Now().Add(100*time.Millisecond)))
	if n, from, err := c.ReadFrom(make([]byte, 10)); err == nil {
		t.Errorf("%d bytes from %s", n, from)
	}
	if got := r.n.flows.now.Load(); got != 1 {
		t.Errorf("%d flows, expected 1", got)
	}
	r.n.flows.most.Store(2)
	for i := range 5 {
		_, err := r.udp(uint16(5000+i)).WriteTo([]byte("x"), stdnet.UDPAddrFromAddrPort(one))
		check(t, err)
	}
	time.Sleep(50 * time.Millisecond)
	if got := r.n.flows.now.Load(); got > 2 {
		t.Errorf("%d flows, expected at most 2", got)
	}
}

func TestUDPForward(t *testing.T) {
	c, err := stdnet.ListenUDP("udp", &stdnet.UDPAddr{IP: stdnet.IPv4(127, 0, 0, 1)})
	check(t, err)
	at := c.LocalAddr().(*stdnet.UDPAddr).AddrPort()
	check(t, c.Close())
	r := newRig(t, config(net.Forward{UDP: true, Host: at, Guest: 53}), 1500, allOffloads)
	server := r.udp(53)
	go func() {
		p := make([]byte, 65536)
		for {
			n, from, err := server.ReadFrom(p)
			if err != nil {
				return
			}
			_, _ = server.WriteTo(append([]byte("re "), p[:n]...), from)
		}
	}()
	check(t, r.n.Do(netproc.Request{MTU: 1500, Offloads: allOffloads, Taken: true}))
	var clients []stdnet.Conn
	for range 3 {
		c, err := stdnet.Dial("udp", at.String())
		check(t, err)
		defer c.Close()
		check(t, c.SetDeadline(time.Now().Add(20*time.Second)))
		clients = append(clients, c)
	}
	for range 2 {
		for i, c := range clients {
			want := strings.Repeat("m", 10+i)
			_, err := c.Write([]byte(want))
			check(t, err)
			p := make([]byte, 100)
			n, err := c.Read(p)
			check(t, err)
			if string(p[:n]) != "re "+want {
				t.Errorf("client %d got %q, expected the answer to %q", i, p[:n], want)
			}
		}
	}
	if got := r.n.flows.now.Load(); got != 3 {
		t.Errorf("%d flows, expected 3", got)
	}
	check(t, r.n.unlisten())
	for deadline := time.Now().Add(20 * time.Second); r.n.flows.now.Load() != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d flows after the port was given back", r.n.flows.now.Load())
		}
	}
}

// TestDNS: the gateway asks the host's name servers, the second one if the first is silent.
func TestDNS(t *testing.T) {
	silent, err := stdnet.ListenUDP("udp", &stdnet.UDPAddr{IP: stdnet.IPv4(127, 0, 0, 1)})
	check(t, err)
	defer silent.Close()
	cfg := config()
	server := udpEcho(t, netip.MustParseAddr("127.0.0.1"))
	cfg.Servers = []netip.AddrPort{silent.LocalAddr().(*stdnet.UDPAddr).AddrPort(), server}
	r := newRig(t, cfg, 1500, allOffloads)
	c := r.udp(0)
	_, err = c.WriteTo([]byte("idquestion"), stdnet.UDPAddrFromAddrPort(netip.AddrPortFrom(gatewayIP, 53)))
	check(t, err)
	p := make([]byte, 100)
	n, from, err := c.ReadFrom(p)
	check(t, err)
	if string(p[:n]) != "idquestion" || from.String() != "192.168.127.1:53" {
		t.Errorf("got %q from %s", p[:n], from)
	}
	// By TCP, too.
	cfg.Servers = []netip.AddrPort{listen(t, netip.MustParseAddr("127.0.0.1"), echo)}
	r = newRig(t, cfg, 1500, allOffloads)
	tc, err := r.dial(netip.AddrPortFrom(gatewayIP, 53))
	check(t, err)
	_, err = tc.Write([]byte("q"))
	check(t, err)
	if _, err := io.ReadFull(tc, p[:1]); err != nil || p[0] != 'q' {
		t.Errorf("by TCP: %q, %v", p[:1], err)
	}
}

func TestServers(t *testing.T) {
	got := Servers(strings.NewReader("# nameserver 1.1.1.1\nnameserver 127.0.0.53\nsearch x\nnameserver fd00::1\nnameserver what\nnameserver 8.8.8.8\nnameserver 9.9.9.9\n"))
	if len(got) != 3 || got[0].String() != "127.0.0.53:53" || got[1].String() != "[fd00::1]:53" || got[2].String() != "8.8.8.8:53" {
		t.Errorf("%v", got)
	}
}

// TestPing: the gateway answers, and does not answer for others.
func TestPing(t *testing.T) {
	r := newRig(t, config(), 1500, allOffloads)
	for to, want := range map[netip.Addr]bool{gatewayIP: true, netip.MustParseAddr("192.0.2.77"): false} {
		var wq waiter.Queue
		ep, terr := r.guest.NewEndpoint(icmp.ProtocolNumber4, ipv4.ProtocolNumber, &wq)
		if terr != nil {
			t.Fatal(terr)
		}
		defer ep.Close()
		entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents)
		wq.EventRegister(&entry)
		address := full(to, 0)
		echo := header.ICMPv4(make([]byte, 16))
		echo.SetType(header.ICMPv4Echo)
		if _, terr := ep.Write(bytes.NewReader(echo), tcpip.WriteOptions{To: &address}); terr != nil {
			t.Fatal(terr)
		}
		wait := 20 * time.Second
		if !want {
			wait = 200 * time.Millisecond
		}
		select {
		case <-ready:
			if !want {
				t.Errorf("%s answers", to)
			}
		case <-time.After(wait):
			if want {
				t.Errorf("%s does not answer", to)
			}
		}
	}
}

// FuzzFrames has a guest send anything, with any header. The network goes on.
func FuzzFrames(f *testing.F) {
	dhcp := udpFrame(full(netip.AddrFrom4([4]byte{}), 68), full(netip.AddrFrom4([4]byte{255, 255, 255, 255}), 67), link(testMAC[:]), header.EthernetBroadcastAddress, message(1))
	out := udpFrame(full(guestIP, 1), full(netip.MustParseAddr("192.0.2.1"), 9), link(testMAC[:]), link(gatewayMAC[:]), []byte("hello"))
	f.Add(make([]byte, headerBytes), dhcp)
	f.Add(make([]byte, headerBytes), out)
	f.Add([]byte{1, 5, 42, 0, 2, 0, 34, 0, 6, 0, 0, 0}, out)
	f.Add([]byte{1, 1, 54, 0, 10, 0, 34, 0, 16, 0, 0, 0}, append(append([]byte{}, out[:23]...), append([]byte{6}, out[24:]...)...))
	arp := append(append(append([]byte{}, out[:12]...), 8, 6, 0, 1, 8, 0, 6, 4, 0, 1), make([]byte, 20)...)
	f.Add(make([]byte, headerBytes), arp)
	ours, theirs := sockets(f)
	n, err := New(config(), 1500, testMAC, ours)
	check(f, err)
	go func() { _, _ = io.Copy(io.Discard, theirs) }()
	f.Fuzz(func(t *testing.T, h, frame []byte) {
		if len(h) != headerBytes || len(frame) < etherHeader || len(frame) > maxFrame {
			return
		}
		n.link.guest.Store(uint64(h[11]) << 7)
		each(h, frame, n.link.deliver)
	})
}
