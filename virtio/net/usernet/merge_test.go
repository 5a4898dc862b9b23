package usernet

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// segment is a frame with data.
func segment(port uint16, seq uint32, flags header.TCPFlags, payload string) []byte {
	f := make([]byte, etherHeader+40+len(payload))
	f[12] = 8
	ip := header.IPv4(f[etherHeader:])
	ip.Encode(&header.IPv4Fields{TotalLength: uint16(len(ip)), TTL: 64, Protocol: uint8(header.TCPProtocolNumber)})
	ip.SetChecksum(^ip.CalculateChecksum())
	header.TCP(f[etherHeader+20:]).Encode(&header.TCPFields{SrcPort: port, SeqNum: seq, AckNum: 7, DataOffset: 20, Flags: flags, WindowSize: 100})
	copy(f[etherHeader+40:], payload)
	return f
}

// Segments that follow each other become one packet; all else passes as it is, in its order.
func TestMerge(t *testing.T) {
	const ack, psh = header.TCPFlagAck, header.TCPFlagAck | header.TCPFlagPsh
	other := segment(1, 106, ack, "ghi")
	other[etherHeader+8]-- // its time to live
	padded := append(segment(1, 106, ack, "ghi"), 0, 0)
	for _, c := range []struct {
		what string
		in   [][]byte
		want []string
	}{
		{"three", [][]byte{segment(1, 100, ack, "abc"), segment(1, 103, ack, "def"), segment(1, 106, psh, "ghi")}, []string{"abcdefghi"}},
		{"two connections", [][]byte{segment(1, 100, ack, "abc"), segment(2, 103, ack, "def")}, []string{"abc", "def"}},
		{"a gap", [][]byte{segment(1, 100, ack, "abc"), segment(1, 104, ack, "def")}, []string{"abc", "def"}},
		{"again", [][]byte{segment(1, 100, ack, "abc"), segment(1, 100, ack, "abc")}, []string{"abc", "abc"}},
		{"an end", [][]byte{segment(1, 100, ack, "abc"), segment(1, 103, ack|header.TCPFlagFin, "def")}, []string{"abc", "def"}},
		{"no data", [][]byte{segment(1, 100, ack, "abc"), segment(1, 103, ack, ""), segment(1, 103, ack, "def")}, []string{"abc", "", "def"}},
		{"another header", [][]byte{segment(1, 103, ack, "def"), other}, []string{"def", "ghi"}},
		{"padding", [][]byte{segment(1, 103, ack, "def"), padded}, []string{"def", "ghi\x00\x00"}},
		{"after push", [][]byte{segment(1, 100, psh, "abc"), segment(1, 103, ack, "def")}, []string{"abc", "def"}},
		{"the sequence wraps", [][]byte{segment(1, 1<<32-3, ack, "abc"), segment(1, 0, ack, "def")}, []string{"abcdef"}},
		{"what is too short", [][]byte{segment(1, 100, ack, "abc"), {1, 2, 3}}, nil},
	} {
		var got []string
		m := merger{deliver: func(f []byte) {
			if len(f) < etherHeader+40 {
				return
			}
			ip := header.IPv4(f[etherHeader:])
			if int(ip.TotalLength()) > len(ip) || !ip.IsChecksumValid() && !bytes.Equal(f, other) {
				t.Errorf("%s: a length of %d in %d bytes, or a wrong checksum", c.what, ip.TotalLength(), len(ip))
			}
			got = append(got, string(f[etherHeader+40:]))
		}}
		for _, f := range c.in {
			m.add(f)
		}
		m.flush()
		m.flush()
		if c.want != nil && !slices.Equal(got, c.want) {
			t.Errorf("%s: %q; want %q", c.what, got, c.want)
		}
	}
}

// No byte of a connection is lost, changed or moved, and no packet is too long.
func TestMergeKeepsTheStream(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	var sent, got [2][]byte
	m := merger{deliver: func(f []byte) {
		if len(f) > etherHeader+maxMerged || int(header.IPv4(f[etherHeader:]).TotalLength()) != len(f)-etherHeader {
			t.Fatalf("a packet of %d bytes", len(f))
		}
		tcp := header.TCP(f[etherHeader+20:])
		i := tcp.SourcePort()
		if int(tcp.SequenceNumber()) != len(got[i]) {
			t.Fatalf("bytes of %d where those of %d are next", tcp.SequenceNumber(), len(got[i]))
		}
		got[i] = append(got[i], tcp.Payload()...)
	}}
	for range 20000 {
		i := r.IntN(20) / 19
		p := bytes.Repeat([]byte{byte(r.Uint32())}, 1+r.IntN(1460))
		flags := header.TCPFlags(header.TCPFlagAck)
		if r.IntN(200) == 0 {
			flags |= header.TCPFlagPsh
		}
		m.add(segment(uint16(i), uint32(len(sent[i])), flags, string(p)))
		sent[i] = append(sent[i], p...)
		if r.IntN(100) == 0 {
			m.flush()
		}
	}
	m.flush()
	for i := range sent {
		if !bytes.Equal(sent[i], got[i]) {
			t.Errorf("connection %d: %d bytes were sent, %d came, or others", i, len(sent[i]), len(got[i]))
		}
	}
}
