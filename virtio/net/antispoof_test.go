package net_test

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/virtiotest"
)

const (
	arp, rarp, ipv4, ipv6 = 0x0806, 0x8035, 0x0800, 0x86dd
	udp, icmp6            = 17, 58
)

var (
	other     = net.MAC{0x52, 0x54, 0, 9, 9, 9}
	antispoof = net.Policy{Antispoof: true}
	// addressed has addresses of both kinds, and a network.
	addressed = net.Policy{Antispoof: true, IPs: []netip.Prefix{
		netip.MustParsePrefix("10.0.0.2/32"), netip.MustParsePrefix("fd00::2/128"), netip.MustParsePrefix("fd01::/64"),
	}}
)

// eth makes a frame behind an empty header.
func eth(from net.MAC, etherType uint16, payload []byte) []byte {
	p := append(make([]byte, net.HeaderBytes), broadcast[:]...)
	p = append(p, from[:]...)
	return append(binary.BigEndian.AppendUint16(p, etherType), payload...)
}

func arpOf(hw net.MAC, sender string) []byte {
	b := append([]byte{0, 1, 8, 0, 6, 4, 0, 2}, hw[:]...)
	b = append(b, netip.MustParseAddr(sender).AsSlice()...)
	return append(b, make([]byte, 10)...)
}

func ip4(from, to string, proto byte, payload ...byte) []byte {
	b := make([]byte, 20)
	b[0], b[9] = 0x45, proto
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
	copy(b[12:], netip.MustParseAddr(from).AsSlice())
	copy(b[16:], netip.MustParseAddr(to).AsSlice())
	return append(b, payload...)
}

func ip6(from string, next byte, payload ...byte) []byte {
	b := make([]byte, 40)
	b[0], b[6] = 0x60, next
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	copy(b[8:], netip.MustParseAddr(from).AsSlice())
	copy(b[24:], netip.MustParseAddr("ff02::1").AsSlice())
	return append(b, payload...)
}

// ndp is a message of neighbour discovery with a target and an option of type 1 or 2.
func ndp(kind byte, target string, option byte, hw net.MAC) []byte {
	b := append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, netip.MustParseAddr(target).AsSlice()...)
	if option != 0 {
		b = append(append(b, option, 1), hw[:]...)
	}
	return b
}

// behind puts headers before a payload: a hop-by-hop header, then those of the kinds given.
func behind(payload []byte, last byte, kinds ...byte) []byte {
	var b []byte
	for i := range kinds {
		next := last
		if i+1 < len(kinds) {
			next = kinds[i+1]
		}
		b = append(b, next, 0, 0, 0, 0, 0, 0, 0)
	}
	return append(b, payload...)
}

var dhcp = []byte{0, 68, 0, 67, 0, 8, 0, 0}

// frames are what a guest may send, and what it may not, by the policy addressed. free says
// that the MAC address alone allows it.
var frames = []struct {
	name      string
	frame     []byte
	own, free bool
}{
	{"IPv4", eth(guestMAC, ipv4, ip4("10.0.0.2", "8.8.8.8", 6, make([]byte, 20)...)), true, true},
	{"IPv4 from another address", eth(guestMAC, ipv4, ip4("10.0.0.3", "8.8.8.8", 6, make([]byte, 20)...)), false, true},
	{"IPv4 from another MAC address", eth(other, ipv4, ip4("10.0.0.2", "8.8.8.8", 6, make([]byte, 20)...)), false, false},
	{"a part of IPv4", eth(guestMAC, ipv4, ip4("10.0.0.2", "8.8.8.8", 6)[:19]), false, true},
	{"IPv4 with half of its options", eth(guestMAC, ipv4, append([]byte{0x46}, ip4("10.0.0.2", "8.8.8.8", 6)[1:]...)), false, true},
	{"IPv4 with a short header", eth(guestMAC, ipv4, append([]byte{0x44}, ip4("10.0.0.2", "8.8.8.8", 6)[1:]...)), false, true},
	{"IPv4 of version 6", eth(guestMAC, ipv4, append([]byte{0x65}, ip4("10.0.0.2", "8.8.8.8", 6)[1:]...)), false, true},
	{"DHCP without an address", eth(guestMAC, ipv4, ip4("0.0.0.0", "255.255.255.255", udp, dhcp...)), true, true},
	{"DHCP of a server", eth(guestMAC, ipv4, ip4("0.0.0.0", "255.255.255.255", udp, 0, 67, 0, 68, 0, 8, 0, 0)), false, true},
	{"DHCP without an address to one station", eth(guestMAC, ipv4, ip4("0.0.0.0", "10.0.0.1", udp, dhcp...)), false, true},
	{"IGMP without an address", eth(guestMAC, ipv4, ip4("0.0.0.0", "224.0.0.22", 2, make([]byte, 8)...)), true, true},
	{"ping without an address", eth(guestMAC, ipv4, ip4("0.0.0.0", "224.0.0.1", 1, make([]byte, 8)...)), false, true},
	{"ARP", eth(guestMAC, arp, arpOf(guestMAC, "10.0.0.2")), true, true},
	{"an ARP probe", eth(guestMAC, arp, arpOf(guestMAC, "0.0.0.0")), true, true},
	{"ARP for another address", eth(guestMAC, arp, arpOf(guestMAC, "10.0.0.1")), false, true},
	{"ARP for another station", eth(guestMAC, arp, arpOf(other, "10.0.0.2")), false, false},
	{"a part of ARP", eth(guestMAC, arp, arpOf(guestMAC, "10.0.0.2")[:27]), false, false},
	{"ARP of another network", eth(guestMAC, arp, append([]byte{0, 6}, arpOf(guestMAC, "10.0.0.2")[2:]...)), false, false},
	{"RARP", eth(guestMAC, rarp, arpOf(guestMAC, "0.0.0.0")), true, true},
	{"RARP for another station", eth(guestMAC, rarp, arpOf(other, "0.0.0.0")), false, false},
	{"IPv6", eth(guestMAC, ipv6, ip6("fd00::2", udp, dhcp...)), true, true},
	{"IPv6 of the network", eth(guestMAC, ipv6, ip6("fd01::77", udp, dhcp...)), true, true},
	{"IPv6 from another address", eth(guestMAC, ipv6, ip6("fd00::3", udp, dhcp...)), false, true},
	{"a part of IPv6", eth(guestMAC, ipv6, ip6("fd00::2", udp)[:39]), false, true},
	{"the link-local address", eth(guestMAC, ipv6, ip6("fe80::5054:ff:fe01:203", udp, dhcp...)), true, true},
	{"another link-local address", eth(guestMAC, ipv6, ip6("fe80::1", udp, dhcp...)), false, true},
	{"a router solicitation", eth(guestMAC, ipv6, ip6("fe80::5054:ff:fe01:203", icmp6, append([]byte{133, 0, 0, 0, 0, 0, 0, 0, 1, 1}, guestMAC[:]...)...)), true, true},
	{"a router solicitation without an address", eth(guestMAC, ipv6, ip6("::", icmp6, 133, 0, 0, 0, 0, 0, 0, 0)), true, true},
	{"a router advertisement", eth(guestMAC, ipv6, ip6("fe80::5054:ff:fe01:203", icmp6, make134()...)), false, true},
	{"a router advertisement behind headers", eth(guestMAC, ipv6, ip6("fe80::5054:ff:fe01:203", 0, behind(make134(), icmp6, 0, 60, 43)...)), false, true},
	{"a redirect", eth(guestMAC, ipv6, ip6("fe80::5054:ff:fe01:203", icmp6, ndp(137, "fd00::9", 0, other)...)), false, true},
	{"DAD", eth(guestMAC, ipv6, ip6("::", icmp6, ndp(135, "fd00::2", 0, other)...)), true, true},
	{"DAD for another address", eth(guestMAC, ipv6, ip6("::", icmp6, ndp(135, "fd00::1", 0, other)...)), false, true},
	{"a neighbour solicitation", eth(guestMAC, ipv6, ip6("fd00::2", icmp6, ndp(135, "fd00::1", 1, guestMAC)...)), true, true},
	{"a neighbour solicitation with another MAC address", eth(guestMAC, ipv6, ip6("fd00::2", icmp6, ndp(135, "fd00::1", 1, other)...)), false, true},
	{"a neighbour advertisement", eth(guestMAC, ipv6, ip6("fd00::2", icmp6, ndp(136, "fd00::2", 2, guestMAC)...)), true, true},
	{"a neighbour advertisement for another address", eth(guestMAC, ipv6, ip6("fd00::2", icmp6, ndp(136, "fd00::1", 2, guestMAC)...)), false, true},
	{"a neighbour advertisement of another MAC address", eth(guestMAC, ipv6, ip6("fd00::2", icmp6, ndp(136, "fd00::2", 2, other)...)), false, true},
	{"a neighbour advertisement behind a header", eth(guestMAC, ipv6, ip6("fd00::2", 60, behind(ndp(136, "fd00::1", 2, guestMAC), icmp6, 60)...)), false, true},
	{"a neighbour advertisement with a broken option", eth(guestMAC, ipv6, ip6("fd00::2", icmp6, append(ndp(136, "fd00::2", 0, other), 2, 0, 0, 0, 0, 0, 0, 0)...)), false, true},
	{"a short neighbour advertisement", eth(guestMAC, ipv6, ip6("fd00::2", icmp6, ndp(136, "fd00::2", 0, other)[:20]...)), false, true},
	{"a fragment", eth(guestMAC, ipv6, ip6("fd00::2", 44, behind(dhcp, udp, 44)...)), true, true},
	{"a later fragment", eth(guestMAC, ipv6, ip6("fd00::2", 44, append([]byte{icmp6, 0, 0, 8, 0, 0, 0, 0}, ndp(136, "fd00::1", 2, other)...)...)), true, true},
	{"a later fragment from another address", eth(guestMAC, ipv6, ip6("fd00::1", 44, append([]byte{udp, 0, 0, 8, 0, 0, 0, 0}, dhcp...)...)), false, true},
	{"a fragment of a ping", eth(guestMAC, ipv6, ip6("fd00::2", 44, behind([]byte{128, 0, 0, 0, 0, 0, 0, 0}, icmp6, 44)...)), true, true},
	{"a neighbour advertisement in a fragment", eth(guestMAC, ipv6, ip6("fd00::2", 44, behind(ndp(136, "fd00::2", 2, guestMAC), icmp6, 44)...)), false, true},
	{"a router advertisement in a fragment", eth(guestMAC, ipv6, ip6("fd00::2", 0, behind(make134(), icmp6, 0, 44, 60)...)), false, true},
	{"a fragment without the rest of its headers", eth(guestMAC, ipv6, ip6("fd00::2", 44, behind(nil, 60, 44)...)), false, true},
	{"a fragment of a fragment", eth(guestMAC, ipv6, ip6("fd00::2", 44, behind(dhcp, udp, 44, 44)...)), false, true},
	{"a fragment without an address", eth(guestMAC, ipv6, ip6("::", 44, behind(make([]byte, 8), udp, 44)...)), false, true},
	{"MLD without an address", eth(guestMAC, ipv6, ip6("::", 0, behind([]byte{143, 0, 0, 0, 0, 0, 0, 0}, icmp6, 0)...)), true, true},
	{"ping without an address", eth(guestMAC, ipv6, ip6("::", icmp6, 128, 0, 0, 0, 0, 0, 0, 0)), false, true},
	{"a ping", eth(guestMAC, ipv6, ip6("fd00::2", icmp6, 128, 0, 0, 0, 0, 0, 0, 0)), true, true},
	{"UDP without an address", eth(guestMAC, ipv6, ip6("::", udp, dhcp...)), false, true},
	{"too many headers", eth(guestMAC, ipv6, ip6("fd00::2", 0, behind(dhcp, udp, slices.Repeat([]byte{0}, 9)...)...)), false, true},
	{"a VLAN", eth(guestMAC, 0x8100, append([]byte{0, 1, 8, 0}, ip4("10.0.0.2", "8.8.8.8", 6)...)), false, false},
	{"a VLAN of a provider", eth(guestMAC, 0x88a8, make([]byte, 50)), false, false},
	{"another protocol", eth(guestMAC, 0x88b5, make([]byte, 50)), false, true},
	{"a bridge's own protocol", with(eth(guestMAC, 0x26, make([]byte, 50)), func(p []byte) { copy(p[net.HeaderBytes:], []byte{1, 0x80, 0xc2, 0, 0, 0}) }), false, false},
}

// make134 is a router advertisement.
func make134() []byte { return append([]byte{134}, make([]byte, 15)...) }

// newGuardedRig is a device with a policy, and offloads.
func newGuardedRig(t testing.TB, p net.Policy) *rig {
	t.Helper()
	w := newWire(t, 1)
	return newRigWith(t, net.Config{Backend: w, MAC: guestMAC, Policy: p}, w, 1, (plain|offloads)&^net.FeatureMTU)
}

// Only the guest's own frames pass, in however many descriptors they come.
func TestAntispoof(t *testing.T) {
	for _, p := range []net.Policy{{}, antispoof, addressed} {
		r := newGuardedRig(t, p)
		foreign := uint64(0)
		for _, f := range frames {
			passes := !p.Antispoof || f.own || f.free && len(p.IPs) == 0
			if !passes {
				foreign++
			}
			check(t, r.mem.WriteAt(f.frame, r.data))
			for _, cut := range []int{len(f.frame), 1, 7} {
				var buffers []virtiotest.Buffer
				for at := 0; at < len(f.frame) && len(buffers) < 200; at += cut {
					buffers = append(buffers, virtiotest.Buffer{GPA: r.data + uint64(at), Len: uint32(min(cut, len(f.frame)-at))})
				}
				r.add(1, buffers, nil)
				r.next(1)
				sent := r.wire.sent(t, 0)
				if passes != (len(sent) == 1) || passes && !bytes.Equal(sent[0], f.frame) {
					t.Errorf("antispoof %v, %d addresses: %s: %d frames have passed", p.Antispoof, len(p.IPs), f.name, len(sent))
				}
			}
		}
		if c := r.d.Counters(); c.TxForeign != 3*foreign || c.TxDropped != 0 {
			t.Errorf("%+v: counted %+v, %d frames were not the guest's", p, c, 3*foreign)
		}
	}
}

// The checksum that the host fills in is no way to another address: it lies behind all that
// was looked at. Packets to be segmented are told by their headers, as others are.
func TestAntispoofChecksum(t *testing.T) {
	tcp4 := eth(guestMAC, ipv4, ip4("10.0.0.2", "8.8.8.8", 6, make([]byte, 3000)...))
	tcp6 := eth(guestMAC, ipv6, ip6("fd00::2", 6, make([]byte, 3000)...))
	spoofed := eth(guestMAC, ipv4, ip4("10.0.0.3", "8.8.8.8", 6, make([]byte, 3000)...))
	na := eth(guestMAC, ipv6, ip6("fd00::2", icmp6, ndp(136, "fd00::2", 2, guestMAC)...))
	ping := eth(guestMAC, ipv6, ip6("fd00::2", icmp6, 128, 0, 0, 0, 0, 0, 0, 0))
	for _, c := range []struct {
		name          string
		frame         []byte
		gso           byte
		start, offset uint16
		own, free     bool
	}{
		{"TCP", tcp4, 0, 34, 16, true, true},
		{"TCP, segmented", tcp4, 1, 34, 16, true, true},
		{"TCP of IPv6, segmented", tcp6, 4, 54, 16, true, true},
		{"another's TCP, segmented", spoofed, 1, 34, 16, false, true},
		{"a checksum for a MAC address", tcp4, 0, 0, 6, false, false},
		{"a checksum for the type", tcp4, 0, 0, 12, false, false},
		{"a checksum for an address", tcp4, 0, 14, 12, false, true},
		{"a checksum for an address, segmented", tcp4, 1, 14, 12, false, true},
		{"a checksum for the end of an IPv6 address", tcp6, 0, 0, 36, false, true},
		{"a checksum for a target", na, 0, 54, 8, false, true},
		{"a checksum for a type of ICMPv6", ping, 0, 54, 0, false, true},
		{"a ping", ping, 0, 54, 2, true, true},
		{"a checksum in ARP", eth(guestMAC, arp, arpOf(guestMAC, "10.0.0.2")), 0, 14, 14, false, false},
	} {
		for _, p := range []net.Policy{antispoof, addressed} {
			r := newGuardedRig(t, p)
			f := bytes.Clone(c.frame)
			f[0], f[1] = 1, c.gso
			binary.LittleEndian.PutUint16(f[4:], 1000)
			binary.LittleEndian.PutUint16(f[6:], c.start)
			binary.LittleEndian.PutUint16(f[8:], c.offset)
			r.send(0, f)
			if passes := c.own || c.free && len(p.IPs) == 0; passes != (len(r.wire.sent(t, 0)) == 1) || passes != (r.d.Counters().TxForeign == 0) {
				t.Errorf("%s, with %d addresses: %+v", c.name, len(p.IPs), r.d.Counters())
			}
		}
	}
}

// With antispoof the guest keeps its MAC address, and one that has changed it elsewhere does
// not come here. What the host says of the guest at its arrival is not the guest's to send.
func TestAntispoofMAC(t *testing.T) {
	r := newGuardedRig(t, addressed)
	if r.command(1, 1, other[:]...) != 1 || r.d.MAC() != guestMAC {
		t.Error("the guest has changed its MAC address")
	}
	if r.command(1, 1, guestMAC[:]...) != 0 {
		t.Error("the guest may not set the MAC address that it has")
	}
	r.d.Announce()
	for len(r.wire.sent(t, 0)) == 0 {
	}
	if n := r.d.Counters().TxForeign; n != 0 {
		t.Errorf("%d announcements were refused", n)
	}
	check(t, r.d.Pause(ctx(t)))
	check(t, r.d.Resume())

	state, err := strictcbor.Marshal(net.State{MAC: other, Status: 1, Pairs: 1})
	check(t, err)
	d, err := net.New(net.Config{Backend: newWire(t, 1), MAC: guestMAC, Policy: antispoof})
	check(t, err)
	if err := d.LoadState(state); err == nil || !strings.Contains(err.Error(), "which antispoof of this host forbids") {
		t.Errorf("a guest with another MAC address comes here: %v", err)
	}
	d, err = net.New(net.Config{Backend: newWire(t, 1), MAC: guestMAC})
	check(t, err)
	check(t, d.LoadState(state))
}

// The policy is the host's: it is neither in what travels nor taken from it.
func TestPolicyIsTheHosts(t *testing.T) {
	words := ",bps=1000,antispoof,ip=10.0.0.2,ip=fd01::/64"
	source := &net.Spec{Options: options(t, "tap=tap0,mac=52:54:00:01:02:03"+words)}
	b, err := strictcbor.Marshal(source)
	check(t, err)
	arrived := new(net.Spec)
	check(t, strictcbor.Unmarshal(b, arrived))
	if s := arrived.Policy.String(); s != "" {
		t.Errorf("%s has travelled", s)
	}
	check(t, arrived.Move(nil))
	if s := arrived.Policy.String(); s != "" {
		t.Errorf("nobody has said %s", s)
	}
	here, err := net.Kind.ParseHere("tap=tap1" + words)
	check(t, err)
	check(t, arrived.Move(here))
	if s := arrived.Policy.String(); s != source.Policy.String() || arrived.Tap != "tap1" {
		t.Errorf("the receiver's words became %s", arrived)
	}
}

// FuzzAntispoof: whatever passes is from the guest's MAC address and one of its addresses,
// or of a guest without one; and no checksum changes that.
func FuzzAntispoof(f *testing.F) {
	for _, frame := range frames {
		f.Add(frame.frame, uint16(0))
	}
	f.Fuzz(func(t *testing.T, p []byte, sum uint16) {
		p = bytes.Clone(p)
		g := net.NewGuard(addressed, guestMAC)
		if !net.CheckSent(p, offloads) || !g.Owns(p) {
			return
		}
		sumAt := 0
		if p[0]&1 != 0 {
			sumAt = net.HeaderBytes + int(binary.LittleEndian.Uint16(p[6:])) + int(binary.LittleEndian.Uint16(p[8:]))
			binary.BigEndian.PutUint16(p[sumAt:], sum) // as the host does
			p[0] = 0
			if !g.Owns(p) {
				t.Fatalf("a checksum at %d made another's frame of %x", sumAt, p)
			}
		}
		e := p[net.HeaderBytes:]
		if net.MAC(e[6:12]) != guestMAC {
			t.Fatalf("from another MAC address: %x", p)
		}
		var from netip.Addr
		switch b := e[14:]; binary.BigEndian.Uint16(e[12:]) {
		case arp, rarp:
			from = netip.AddrFrom4([4]byte(b[14:]))
		case ipv4:
			from = netip.AddrFrom4([4]byte(b[12:]))
		case ipv6:
			from = netip.AddrFrom16([16]byte(b[8:]))
		default:
			t.Fatalf("another protocol: %x", p)
		}
		local := netip.MustParseAddr("fe80::5054:ff:fe01:203")
		if !from.IsUnspecified() && from != local && !slices.ContainsFunc(addressed.IPs, func(p netip.Prefix) bool { return p.Contains(from) }) {
			t.Fatalf("from %s: %x", from, p)
		}
	})
}
