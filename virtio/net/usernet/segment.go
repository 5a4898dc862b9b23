package usernet

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const gsoUDP = 5 // VIRTIO_NET_HDR_GSO_UDP_L4

// each calls deliver with the packets that a frame of the guest is. Segments of TCP stay
// together: the stack takes a packet of any length. Datagrams must be cut, since their length
// means something. h is the frame's header.
func each(h, frame []byte, deliver func([]byte)) {
	size := int(binary.LittleEndian.Uint16(h[4:]))
	if h[1] != gsoUDP || size == 0 {
		deliver(frame)
		return
	}
	ip := header.IPv4(frame[etherHeader:])
	if binary.BigEndian.Uint16(frame[12:]) != uint16(header.IPv4ProtocolNumber) || !ip.IsValid(len(ip)) || ip.TransportProtocol() != header.UDPProtocolNumber ||
		int(ip.TotalLength()) < int(ip.HeaderLength())+header.UDPMinimumSize {
		return
	}
	head := etherHeader + int(ip.HeaderLength()) + header.UDPMinimumSize
	payload := frame[head : etherHeader+int(ip.TotalLength())]
	one := make([]byte, head+min(size, len(payload)))
	for at := 0; at < len(payload); at += size {
		part := payload[at:min(at+size, len(payload))]
		p := append(append(one[:0], frame[:head]...), part...)
		cut := header.IPv4(p[etherHeader:])
		cut.SetTotalLength(uint16(len(p) - etherHeader))
		cut.SetChecksum(0)
		cut.SetChecksum(^cut.CalculateChecksum())
		header.UDP(p[head-header.UDPMinimumSize:]).SetLength(uint16(header.UDPMinimumSize + len(part)))
		deliver(p)
	}
}

// cutTCP calls send with the segments of an IPv4 packet of TCP that is in a frame, each with
// at most size bytes and with its checksums. start is where TCP's header begins. The frame is
// one that the stack has made.
func cutTCP(frame []byte, start, size int, send func([]byte)) {
	tcp := header.TCP(frame[start:])
	head := start + int(tcp.DataOffset())
	payload := frame[head:]
	flags, seq := tcp.Flags(), tcp.SequenceNumber()
	id := header.IPv4(frame[etherHeader:]).ID()
	one := make([]byte, head+min(size, len(payload)))
	for at := 0; at == 0 || at < len(payload); at += size {
		part := payload[at:min(at+size, len(payload))]
		p := append(append(one[:0], frame[:head]...), part...)
		ip, t := header.IPv4(p[etherHeader:start]), header.TCP(p[start:])
		ip.SetTotalLength(uint16(len(p) - etherHeader))
		ip.SetID(id)
		ip.SetChecksum(0)
		ip.SetChecksum(^ip.CalculateChecksum())
		id++
		t.SetSequenceNumber(seq + uint32(at))
		f := flags
		if at+size < len(payload) {
			f &^= header.TCPFlagFin | header.TCPFlagPsh
		}
		t.SetFlags(uint8(f))
		t.SetChecksum(0)
		sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(), uint16(len(t)))
		t.SetChecksum(^checksum.Checksum(t, sum))
		send(p)
	}
}

// udpFrame makes a frame of a datagram that is not fragmented.
func udpFrame(from, to tcpip.FullAddress, fromMAC, toMAC tcpip.LinkAddress, payload []byte) []byte {
	f := make([]byte, etherHeader+header.IPv4MinimumSize+header.UDPMinimumSize+len(payload))
	header.Ethernet(f).Encode(&header.EthernetFields{SrcAddr: fromMAC, DstAddr: toMAC, Type: header.IPv4ProtocolNumber})
	ip := header.IPv4(f[etherHeader:])
	ip.Encode(&header.IPv4Fields{TotalLength: uint16(len(ip)), TTL: 64, Protocol: uint8(header.UDPProtocolNumber), SrcAddr: from.Addr, DstAddr: to.Addr})
	ip.SetChecksum(^ip.CalculateChecksum())
	u := header.UDP(ip.Payload())
	u.Encode(&header.UDPFields{SrcPort: from.Port, DstPort: to.Port, Length: uint16(len(u))})
	copy(u.Payload(), payload)
	sum := header.PseudoHeaderChecksum(header.UDPProtocolNumber, from.Addr, to.Addr, uint16(len(u)))
	u.SetChecksum(^checksum.Checksum(u, sum))
	return f
}
