package net

import (
	"encoding/binary"
	"net/netip"
)

// EtherTypes and protocol numbers (IANA).
const (
	etherIPv4 = 0x0800
	etherARP  = 0x0806
	etherRARP = 0x8035
	etherIPv6 = 0x86dd

	protoHopByHop = 0
	protoIGMP     = 2
	protoUDP      = 17
	protoRouting  = 43
	protoFragment = 44
	protoAH       = 51
	protoICMPv6   = 58
	protoDestOpts = 60

	arpBytes  = 28
	ip6Bytes  = 40
	ndpTarget = 8  // where the target is in NS and NA (RFC 4861, 4.3 and 4.4)
	ndpNS     = 24 // where their options begin
)

// guard tells a guest's own frames from others. It looks at a copy of the frame that the
// guest cannot change.
type guard struct {
	mac    MAC
	byIP   bool // only from these addresses; otherwise from any
	v4, v6 []netip.Prefix
}

// newGuard makes the guard of a policy; nil if the guest may send anything. A guest has
// the link-local address that follows from its MAC address (RFC 4291, appendix A) in
// addition to those of the policy.
func newGuard(p Policy, mac MAC) *guard {
	if !p.Antispoof {
		return nil
	}
	g := &guard{mac: mac, byIP: len(p.IPs) > 0}
	local := netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]})
	g.v6 = append(g.v6, netip.PrefixFrom(local, 128))
	for _, ip := range p.IPs {
		if ip.Addr().Is4() {
			g.v4 = append(g.v4, ip)
		} else {
			g.v6 = append(g.v6, ip)
		}
	}
	return g
}

// owns reports whether p, a frame behind its header that [checkSent] has accepted, is the
// guest's own. The checksum that the host is asked to fill in must lie behind all that was
// looked at: it could make another address of it.
func (g *guard) owns(p []byte) bool {
	frame := p[HeaderBytes:]
	if MAC(frame[6:12]) != g.mac || reserved(frame) {
		return false
	}
	looked, own := g.network(frame[etherHeader:], binary.BigEndian.Uint16(frame[12:]))
	if !own || p[headerFlags]&flagNeedsCsum == 0 {
		return own
	}
	at := int(binary.LittleEndian.Uint16(p[headerCsumStart:])) + int(binary.LittleEndian.Uint16(p[headerCsumOffset:]))
	return at >= etherHeader+looked
}

// reserved reports whether a frame is for bridges themselves (IEEE 802.1Q, table 8-1:
// STP, LACP, PAUSE and others), for which a guest has nothing to say.
func reserved(frame []byte) bool {
	return [5]byte(frame[:5]) == [5]byte{0x01, 0x80, 0xc2, 0, 0} && frame[5]&0xf0 == 0
}

// network looks at what is behind the Ethernet header. It returns how many bytes it has
// looked at, and whether they are the guest's.
func (g *guard) network(b []byte, etherType uint16) (looked int, own bool) {
	switch etherType {
	case 0x8100, 0x88a8, 0x9100, 0x9200: // VLAN tags
		return 0, false
	case etherARP, etherRARP:
		return arpBytes, g.arp(b)
	case etherIPv4:
		if g.byIP {
			return g.ip4(b)
		}
	case etherIPv6:
		if g.byIP {
			return g.ip6(b)
		}
	}
	return 0, !g.byIP
}

// arp looks at the sender of ARP (RFC 826). One without an address probes for a conflict
// (RFC 5227).
func (g *guard) arp(b []byte) bool {
	if len(b) < arpBytes || [6]byte(b[:6]) != [6]byte{0, 1, 8, 0, 6, 4} || MAC(b[8:14]) != g.mac {
		return false
	}
	sender := netip.AddrFrom4([4]byte(b[14:18]))
	return !g.byIP || sender.IsUnspecified() || contains(g.v4, sender)
}

// ip4 looks at IPv4. A guest without an address asks for one by DHCP, and may join groups
// (RFC 3376, 4.2.13).
func (g *guard) ip4(b []byte) (looked int, own bool) {
	if len(b) < 20 || b[0]>>4 != 4 {
		return 0, false
	}
	header := int(b[0]&15) * 4
	if header < 20 || header > len(b) {
		return 0, false
	}
	from := netip.AddrFrom4([4]byte(b[12:16]))
	if !from.IsUnspecified() {
		return header, contains(g.v4, from)
	}
	to := netip.AddrFrom4([4]byte(b[16:20]))
	fragment := binary.BigEndian.Uint16(b[6:])&0x3fff != 0
	switch {
	case len(g.v4) == 0 || fragment || len(b) < header+8:
		return 0, false
	case b[9] == protoUDP:
		client, server := binary.BigEndian.Uint16(b[header:]), binary.BigEndian.Uint16(b[header+2:])
		return header + 4, client == 68 && server == 67 && to == netip.AddrFrom4([4]byte{255, 255, 255, 255})
	}
	return header, b[9] == protoIGMP && to.IsMulticast()
}

// ip6 looks at IPv6 and finds what its headers lead to. All headers of a packet in
// fragments must be in the first one (RFC 7112).
func (g *guard) ip6(b []byte) (looked int, own bool) {
	if len(b) < ip6Bytes || b[0]>>4 != 6 {
		return 0, false
	}
	from := netip.AddrFrom16([16]byte(b[8:24]))
	own = contains(g.v6, from)
	if !own && !from.IsUnspecified() {
		return 0, false
	}
	next, at, fragment := b[6], ip6Bytes, false
	for range 8 { // headers; more than that nobody uses
		if at+8 > len(b) {
			return 0, false
		}
		switch next {
		case protoHopByHop, protoRouting, protoDestOpts:
			next, at = b[at], at+8+8*int(b[at+1])
		case protoAH:
			next, at = b[at], at+8+4*int(b[at+1])
		case protoFragment:
			if first := binary.BigEndian.Uint16(b[at+2:])>>3 == 0; !first || fragment {
				return at + 8, own && !fragment
			}
			next, at, fragment = b[at], at+8, true
		case protoICMPv6:
			if kind := b[at]; fragment && kind >= 133 && kind <= 137 {
				return 0, false // neighbour discovery has no fragments (RFC 6980)
			}
			return g.icmp6(b, at, own)
		default:
			return at, own
		}
	}
	return 0, false
}

// icmp6 looks at neighbour discovery (RFC 4861). A guest without an address may look for
// routers, for a conflict about its own address, and join groups (RFC 4862, 3590). It is no
// router, so that it advertises and redirects nothing.
func (g *guard) icmp6(b []byte, at int, own bool) (looked int, ok bool) {
	const typeAndCode = 2
	switch b[at] {
	case 131, 132, 143: // MLD's reports
		return at + typeAndCode, true
	case 133: // router solicitation
		return len(b), g.options(b, at+8)
	case 134, 137: // router advertisement, redirect
		return 0, false
	case 135: // neighbour solicitation: anyone may be asked for; without an address, oneself
		return len(b), g.options(b, at+ndpNS) && (own || g.target(b[at:]))
	case 136: // neighbour advertisement
		return len(b), g.options(b, at+ndpNS) && own && g.target(b[at:])
	}
	return at + typeAndCode, own
}

func (g *guard) target(b []byte) bool {
	return contains(g.v6, netip.AddrFrom16([16]byte(b[ndpTarget:ndpTarget+16])))
}

// options reports whether the options of neighbour discovery, from at to the packet's end,
// name no link-layer address (RFC 4861, 4.6.1) but the guest's.
func (g *guard) options(b []byte, at int) bool {
	end := ip6Bytes + int(binary.BigEndian.Uint16(b[4:]))
	if end > len(b) || at > end {
		return false
	}
	for b = b[at:end]; len(b) >= 8; {
		n := 8 * int(b[1])
		if n == 0 || n > len(b) || b[0] >= 1 && b[0] <= 2 && MAC(b[2:8]) != g.mac {
			return false
		}
		b = b[n:]
	}
	return len(b) == 0
}

func contains(all []netip.Prefix, a netip.Addr) bool {
	for _, p := range all {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// mayBe reports whether the guest may have a MAC address.
func (d *Device) mayBe(m MAC) bool { return d.guard == nil && !d.cfg.OneMAC || m == d.cfg.MAC }
