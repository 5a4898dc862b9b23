package migrate

import "encoding/binary"

// isZero tells whether every byte of p is zero. The guest may write p
// meanwhile; the answer then is of some mixture of before and after, and the
// dirty log reports the write.
//
// The eight loads of a line have no order among them, so the processor keeps
// several in flight; a page with content is told by its first line.
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
