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

// checkSent looks at a frame that the guest wants to send, header in front, and
// says whether the host gets it. Bits that mean nothing in this direction are
// taken out. It is a copy: the guest cannot change it any more.
//
// The host's kernel checks again; what is refused here is what the guest was
// not offered, or was offered and gets wrong. maxPlain is the longest frame
// that is not to be segmented.
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

// checkReceived says whether the guest may get a frame of the host's: it may
// have come from before the guest said what it takes.
func checkReceived(p []byte, guest uint64) bool {
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
	return gso == gsoNone ||
		gsoNegotiated(gso, guest, FeatureGuestTSO4, FeatureGuestTSO6, FeatureGuestUSO4, FeatureGuestUSO6, FeatureGuestECN)
}

// gsoNegotiated says whether a GSO type is among the features. UDP's is one
// type for both of IPv4 and IPv6.
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
