package usernet

import (
	"encoding/binary"
	"net/netip"

	"github.com/govmm/govmm/virtio/net"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	dhcpServer = 67
	dhcpClient = 68
	dnsPort    = 53
)

// accept reports whether a frame of the guest is for the stack: ARP, and IPv4 from the guest's
// address, TCP and UDP to any and ICMP to the gateway. A message for the DHCP server is
// answered here. The rest is dropped.
func (n *Network) accept(frame []byte) bool {
	ok := n.wanted(frame)
	if from := net.MAC(frame[6:12]); ok && from != n.guestMAC && from[0]&1 == 0 {
		n.setGuest(from)
	}
	return ok
}

// setGuest says where the guest's address is. The stack never asks by ARP: the question would
// come from an address of the world, and not every guest answers that.
func (n *Network) setGuest(m net.MAC) {
	n.guestMAC = m
	_ = n.stack.AddStaticNeighbor(nic, header.IPv4ProtocolNumber, full(guestIP, 0).Addr, link(m[:])) // the stack has IPv4
}

func (n *Network) wanted(frame []byte) bool {
	eth := header.Ethernet(frame)
	if to := eth.DestinationAddress(); to != n.link.LinkAddress() && to != header.EthernetBroadcastAddress {
		return false
	}
	switch eth.Type() {
	case header.ARPProtocolNumber:
		a := header.ARP(frame[etherHeader:])
		if len(a) < header.ARPSize || !a.IsValid() {
			return false
		}
		// What the guest asks about itself nobody answers, and of no other address it
		// may say that it has it.
		from, about := netip.AddrFrom4([4]byte(a.ProtocolAddressSender())), netip.AddrFrom4([4]byte(a.ProtocolAddressTarget()))
		return from == guestIP && (about == gatewayIP || about == hostIP && n.cfg.Host)
	case header.IPv4ProtocolNumber:
		return n.acceptIPv4(frame)
	}
	return false
}

func (n *Network) acceptIPv4(frame []byte) bool {
	ip := header.IPv4(frame[etherHeader:])
	if len(ip) < header.IPv4MinimumSize || !ip.IsValid(len(ip)) {
		return false
	}
	from, to := netip.AddrFrom4(ip.SourceAddress().As4()), netip.AddrFrom4(ip.DestinationAddress().As4())
	whole := ip.FragmentOffset() == 0 && ip.Flags()&header.IPv4FlagMoreFragments == 0
	switch ip.Protocol() {
	case uint8(header.UDPProtocolNumber):
		u := ip.Payload()
		if whole && len(u) >= header.UDPMinimumSize && header.UDP(u).DestinationPort() == dhcpServer {
			if answer := n.dhcp(header.UDP(u).Payload()); answer != nil && (from.IsUnspecified() || from == guestIP) {
				n.link.send(answer)
			}
			return false
		}
	case uint8(header.TCPProtocolNumber):
	case uint8(header.ICMPv4ProtocolNumber):
		if to != gatewayIP {
			return false // the stack would answer for everybody
		}
	default:
		return false
	}
	return from == guestIP && !to.IsMulticast() && to != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// reach returns the host's address for one that the guest sends to, if it may.
func (n *Network) reach(to netip.AddrPort) (netip.AddrPort, bool) {
	a := to.Addr()
	switch {
	case a == hostIP && n.cfg.Host:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), to.Port()), true
	case subnet.Contains(a), a.IsLoopback(), a.IsUnspecified(), a.IsMulticast(), a.As4()[0] == 0, a.As4()[0] >= 240:
		return to, false
	case a.IsLinkLocalUnicast(): // where clouds keep their hosts' credentials
		return to, false
	}
	return to, to.Port() != 0
}

// dhcp answers a message of a DHCP client (RFC 2131) with a frame; nil: there is no answer.
// There is one address, which is the guest's.
func (n *Network) dhcp(m []byte) []byte {
	const (
		fixed = 236 // bytes before the options
		magic = 0x63825363
	)
	if len(m) < fixed+4 || m[0] != 1 || m[1] != 1 || m[2] != 6 || binary.BigEndian.Uint32(m[fixed:]) != magic {
		return nil
	}
	kind, asked, server := byte(0), guestIP, gatewayIP
	for o := m[fixed+4:]; len(o) > 0 && o[0] != 255; {
		if o[0] == 0 {
			o = o[1:]
			continue
		}
		if len(o) < 2 || len(o) < 2+int(o[1]) {
			return nil
		}
		value := o[2 : 2+o[1]]
		switch {
		case o[0] == 53 && len(value) == 1:
			kind = value[0]
		case o[0] == 50 && len(value) == 4:
			asked = netip.AddrFrom4([4]byte(value))
		case o[0] == 54 && len(value) == 4:
			server = netip.AddrFrom4([4]byte(value))
		}
		o = o[2+len(value):]
	}
	if own := netip.AddrFrom4([4]byte(m[12:16])); !own.IsUnspecified() {
		asked = own // it renews
	}
	answer := byte(0)
	switch {
	case kind == 1: // DISCOVER
		answer = 2 // OFFER
	case kind == 3 && server != gatewayIP: // REQUEST to another
		return nil
	case kind == 3 && asked != guestIP:
		answer = 6 // NAK
	case kind == 3, kind == 8: // INFORM
		answer = 5 // ACK
	default:
		return nil
	}
	r := make([]byte, fixed, 320)
	r[0], r[1], r[2] = 2, 1, 6
	copy(r[4:8], m[4:8])     // transaction
	copy(r[10:12], m[10:12]) // flags
	copy(r[28:34], m[28:34]) // hardware address
	r = binary.BigEndian.AppendUint32(r, magic)
	option := func(code byte, value ...byte) { r = append(append(r, code, byte(len(value))), value...) }
	gateway := gatewayIP.AsSlice()
	option(53, answer)
	option(54, gateway...)
	if answer != 6 {
		if kind != 8 {
			copy(r[16:20], guestIP.AsSlice())
			option(51, 0, 1, 0x51, 0x80) // a day
		}
		option(1, mask(subnet)...)
		option(3, gateway...)
		option(6, gateway...)
		option(26, byte(n.mtu>>8), byte(n.mtu))
	}
	r = append(r, 255)
	r = append(r, make([]byte, max(0, 300-len(r)))...) // BOOTP's length
	toIP, toMAC := guestIP, link(m[28:34])
	if m[10]&0x80 != 0 || answer == 6 {
		toIP, toMAC = netip.AddrFrom4([4]byte{255, 255, 255, 255}), header.EthernetBroadcastAddress
	}
	return udpFrame(full(gatewayIP, dhcpServer), full(toIP, dhcpClient), n.link.LinkAddress(), toMAC, r)
}
