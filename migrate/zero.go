package migrate

import "encoding/binary"

// isZero reports whether every byte of p is zero. If the guest writes p meanwhile the
// result may be of a mixture of old and new bytes, and the dirty log reports the write.
//
// The eight loads of a line do not depend on each other, so the processor has several
// in flight. Most pages with content differ from zero in their first line.
func isZero(p []byte) bool {
	le := binary.LittleEndian
	for len(p) >= 64 {
		line := p[:64:64]
		if le.Uint64(line)|le.Uint64(line[8:])|le.Uint64(line[16:])|le.Uint64(line[24:])|
			le.Uint64(line[32:])|le.Uint64(line[40:])|le.Uint64(line[48:])|le.Uint64(line[56:]) != 0 {
			return false
		}
		p = p[64:]
	}
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
