package loader

import (
	"encoding/binary"
	"io"
	"math/bits"
)

// x86Reader decodes xz's x86 filter. The filter has made the targets of CALL (e8)
// and JMP (e9) absolute, so that equal targets compress well; x86Reader makes them
// relative again. A target is converted only if its top byte is 0 or 255, and if the
// opcodes in the three bytes before do not make it unlikely to be a target.
type x86Reader struct {
	r     io.Reader
	buf   []byte // [0,ready) is converted, [ready,len) is not
	at    int    // number of bytes of buf that were returned
	ready int
	pos   uint32 // position of buf[0] in the stream
	err   error

	// seen has a bit for each of the last three bytes, the latest lowest: set
	// if the byte was an opcode and was not converted.
	seen uint32
}

// x86Lookahead is the number of bytes of an instruction with its target.
const x86Lookahead = 5

func newX86Reader(r io.Reader) io.Reader {
	return &x86Reader{r: r, buf: make([]byte, 0, 64<<10)}
}

func (x *x86Reader) Read(p []byte) (int, error) {
	for x.at == x.ready {
		if x.err != nil {
			return 0, x.err
		}
		x.fill()
	}
	n := copy(p, x.buf[x.at:x.ready])
	x.at += n
	return n, nil
}

// fill drops the returned bytes, reads more and converts them. The last bytes of the
// stream, too few for an instruction, are not converted.
func (x *x86Reader) fill() {
	x.pos += uint32(x.ready)
	x.buf = x.buf[:copy(x.buf, x.buf[x.ready:])]
	x.at, x.ready = 0, 0
	for len(x.buf) < cap(x.buf) && x.err == nil {
		var n int
		n, x.err = x.r.Read(x.buf[len(x.buf):cap(x.buf)])
		x.buf = x.buf[:len(x.buf)+n]
	}
	x.ready = x.convert(x.buf)
	if x.err != nil {
		x.ready = len(x.buf)
	}
}

// convert converts all complete instructions and returns the number of final bytes.
func (x *x86Reader) convert(b []byte) int {
	i := 0
	for i+x86Lookahead <= len(b) {
		if b[i]&0xfe != 0xe8 {
			x.seen = x.seen << 1 & 7
			i++
			continue
		}
		if !x.isTarget(b[i:]) {
			x.seen = (x.seen<<1 | 1) & 7
			i++
			continue
		}
		target := binary.LittleEndian.Uint32(b[i+1:])
		binary.LittleEndian.PutUint32(b[i+1:], x.relative(target, x.pos+uint32(i)+x86Lookahead))
		x.seen = 0
		i += x86Lookahead
	}
	return i
}

// isTarget returns whether the packer has converted the bytes after the opcode b[0].
// It has not if they overlap the targets of two earlier opcodes, or if the top byte
// of the one overlapped target looks like that of a target.
func (x *x86Reader) isTarget(b []byte) bool {
	if bits.OnesCount32(x.seen) > 1 {
		return false
	}
	if x.seen != 0 && isSign(b[4-bits.Len32(x.seen)]) {
		return false
	}
	return isSign(b[4])
}

// relative returns the distance of a target from the next instruction, 25 bits with
// sign. If the result looked like a target of the overlapped opcode, the packer has
// inverted the lower bits and converted again.
func (x *x86Reader) relative(target, next uint32) uint32 {
	overlap := 8 * bits.Len32(x.seen)
	d := target - next
	// Valid data need at most two steps; the limit is for hostile data.
	for range 32 {
		if overlap == 0 || !isSign(byte(d>>(24-overlap))) {
			break
		}
		d = (d ^ (1<<(32-overlap) - 1)) - next
	}
	return uint32(int32(d<<7) >> 7)
}

// isSign returns whether b is the top byte of a short distance.
func isSign(b byte) bool { return b == 0 || b == 0xff }
