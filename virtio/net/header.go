package net

import "encoding/binary"

// HeaderBytes is the length of struct virtio_net_hdr, section 5.1.6: one byte
// each of flags and GSO type, five words of 16 bits. With VIRTIO_F_VERSION_1 it
// always has num_buffers.
const HeaderBytes = 12

const (
	headerFlags = iota
	headerGSOType
	headerLen
	_
	headerGSOSize
	_
	headerCsumStart
	_
	headerCsumOffset
	_
	headerNumBuffers
)

const (
	flagNeedsCsum = 1
	flagDataValid = 2

	gsoNone  = 0
	gsoTCPv4 = 1
	gsoTCPv6 = 4
	gsoUDPL4 = 5
	gsoECN   = 0x80
)

// checkSent reports whether a frame of the guest, with its header, may be sent. It
// clears bits that have no meaning in this direction. p is a copy that the guest
// cannot change.
//
// The host's kernel checks the frame again. checkSent refuses what was not
// negotiated, and invalid headers. maxPlain is the longest frame that need not be
// segmented.
func checkSent(p []byte, features uint64, maxPlain int) bool {
	if len(p) < HeaderBytes+etherHeader {
		return false
	}
	frame := len(p) - HeaderBytes
	p[headerFlags] &= flagNeedsCsum
	binary.LittleEndian.PutUint16(p[headerNumBuffers:], 0)
	needsCsum := p[headerFlags] != 0
	if needsCsum {
		start := int(binary.LittleEndian.Uint16(p[headerCsumStart:]))
		offset := int(binary.LittleEndian.Uint16(p[headerCsumOffset:]))
		if features&FeatureCsum == 0 || start+offset+2 > frame {
			return false
		}
	}
	gso := p[headerGSOType]
	if gso == gsoNone {
		return frame <= maxPlain
	}
	if !gsoNegotiated(gso, features, FeatureHostTSO4, FeatureHostTSO6, FeatureHostUSO, FeatureHostUSO, FeatureHostECN) {
		return false
	}
	size := binary.LittleEndian.Uint16(p[headerGSOSize:])
	head := int(binary.LittleEndian.Uint16(p[headerLen:]))
	return needsCsum && size > 0 && head <= frame && frame <= maxFrame
}

// checkReceived reports whether the guest accepts a frame from the host. A frame
// may have waited there since before the guest set its offloads. most is the longest
// frame, with its header, that need not be segmented: the tap's MTU may be larger than
// what the guest was told.
func checkReceived(p []byte, guest uint64, most int) bool {
	if len(p) < HeaderBytes+etherHeader {
		return false
	}
	if guest&FeatureGuestCsum == 0 {
		if p[headerFlags]&flagNeedsCsum != 0 {
			return false
		}
		p[headerFlags] &^= flagDataValid
	}
	gso := p[headerGSOType]
	return gso == gsoNone && len(p) <= most ||
		gso != gsoNone && gsoNegotiated(gso, guest, FeatureGuestTSO4, FeatureGuestTSO6, FeatureGuestUSO4, FeatureGuestUSO6, FeatureGuestECN)
}

// gsoNegotiated reports whether the features include a GSO type. UDP has one type
// for IPv4 and IPv6.
func gsoNegotiated(gso byte, features, tso4, tso6, uso4, uso6, ecn uint64) bool {
	if gso&gsoECN != 0 && features&ecn == 0 {
		return false
	}
	switch gso &^ gsoECN {
	case gsoTCPv4:
		return features&tso4 != 0
	case gsoTCPv6:
		return features&tso6 != 0
	case gsoUDPL4:
		return gso&gsoECN == 0 && features&(uso4|uso6) != 0
	}
	return false
}
