package usernet

import (
	"bytes"
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// merger makes one packet of segments of TCP that follow each other, as network cards do. A
// guest without segmentation offload sends its data in pieces of its MTU, and each piece costs
// the stack as much as a long packet. It holds frames only while more of them are at hand.
type merger struct {
	deliver func(frame []byte)

	held    []byte // a frame, whose lengths are not up to date; empty: none
	next    uint32 // the sequence number that follows it
	payload int    // where its payload begins
	merged  bool   // it is more than one
}

// maxMerged bounds a packet with its IPv4 header.
const maxMerged = 65535

// add delivers a frame, now or with what follows it.
func (m *merger) add(frame []byte) {
	at := dataSegment(frame)
	if at == 0 {
		m.flush()
		m.deliver(frame)
		return
	}
	tcp := header.TCP(frame[etherHeader+header.IPv4MinimumSize:])
	if len(m.held) > 0 && m.follows(frame, at) {
		m.held = append(m.held, frame[at:]...)
		m.merged = true
	} else {
		m.flush()
		m.held = append(m.held[:0], frame...)
		m.next, m.payload, m.merged = tcp.SequenceNumber(), at, false
	}
	m.next += uint32(len(frame) - at)
	if tcp.Flags()&header.TCPFlagPsh != 0 {
		header.TCP(m.held[etherHeader+header.IPv4MinimumSize:]).SetFlags(uint8(tcp.Flags()))
		m.flush()
	}
}

// flush delivers what is held.
func (m *merger) flush() {
	if len(m.held) == 0 {
		return
	}
	if m.merged {
		ip := header.IPv4(m.held[etherHeader : etherHeader+header.IPv4MinimumSize])
		ip.SetTotalLength(uint16(len(m.held) - etherHeader))
		ip.SetChecksum(0)
		ip.SetChecksum(^ip.CalculateChecksum())
	}
	m.deliver(m.held)
	m.held = m.held[:0]
}

// dataSegment returns where the payload of a frame begins that is a segment of TCP in IPv4
// with data and without anything that is special; 0: it is none.
func dataSegment(frame []byte) int {
	const tcpAt = etherHeader + header.IPv4MinimumSize
	if len(frame) < tcpAt+header.TCPMinimumSize || binary.BigEndian.Uint16(frame[12:]) != uint16(header.IPv4ProtocolNumber) {
		return 0
	}
	ip, tcp := frame[etherHeader:tcpAt], header.TCP(frame[tcpAt:])
	const fragment = 0xbfff // all of the field but "do not fragment"
	if ip[0] != 0x45 || ip[9] != uint8(header.TCPProtocolNumber) || binary.BigEndian.Uint16(ip[6:])&fragment != 0 ||
		int(binary.BigEndian.Uint16(ip[2:])) != len(frame)-etherHeader {
		return 0
	}
	at := tcpAt + int(tcp.DataOffset())
	if tcp.Flags()|header.TCPFlagPsh != header.TCPFlagAck|header.TCPFlagPsh || int(tcp.DataOffset()) < header.TCPMinimumSize || at >= len(frame) {
		return 0
	}
	return at
}

// follows reports whether a frame, whose payload begins at an offset, continues the one that
// is held: all but identification, lengths, checksums and sequence number is alike.
func (m *merger) follows(frame []byte, at int) bool {
	const ip, tcp = etherHeader, etherHeader + header.IPv4MinimumSize
	h := m.held
	return at == m.payload && len(h)+len(frame)-at <= maxMerged+etherHeader &&
		binary.BigEndian.Uint32(frame[tcp+4:]) == m.next &&
		bytes.Equal(h[:ip+2], frame[:ip+2]) && // addresses, type, and IP's version and class of service
		h[ip+8] == frame[ip+8] && // its time to live
		bytes.Equal(h[ip+12:tcp+4], frame[ip+12:tcp+4]) && // addresses and ports
		bytes.Equal(h[tcp+8:tcp+13], frame[tcp+8:tcp+13]) && // acknowledgement and length of the header
		bytes.Equal(h[tcp+14:tcp+16], frame[tcp+14:tcp+16]) && // window
		bytes.Equal(h[tcp+18:at], frame[tcp+18:at]) // urgent pointer and options
}
