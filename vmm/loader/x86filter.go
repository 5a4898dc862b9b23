package loader

import (
	"encoding/binary"
	"io"
	"math/bits"
)

// x86Reader undoes xz's x86 filter: the targets of CALL (e8) and JMP (e9),
// absolute in the packed data so that equal targets compress well, become
// relative again. A target is only converted if its top byte is 0 or 255, and
// if no opcode in the three bytes before makes it unlikely to be one.
type x86Reader struct {
	r     io.Reader
	buf   []byte // [0,ready) is converted, [ready,len) is not
	at    int    // what of buf was returned
	ready int
	pos   uint32 // position in the stream of buf[0]
	err   error

	// seen has a bit for each of the last three bytes that was an opcode
	// and was not converted, the latest lowest.
	seen uint32
}

// x86Lookahead is how many bytes an instruction has, without which it cannot
// be converted.
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

// fill drops what was returned, reads more and converts it. At the end the
// last bytes, too few for an instruction, are as they are.
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

// convert converts all instructions that are whole and returns how many bytes
// are final.
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

// isTarget says whether the packer converted what follows the opcode b[0]. It
// did not if that overlaps what two earlier opcodes would take, or if the top
// byte of the overlapped one looks like a target's.
func (x *x86Reader) isTarget(b []byte) bool {
	if bits.OnesCount32(x.seen) > 1 {
		return false
	}
	if x.seen != 0 && isSign(b[4-bits.Len32(x.seen)]) {
		return false
	}
	return isSign(b[4])
}

// relative returns the distance of a target from the next instruction, 25 bits
// with sign. Where the packer found that the result would look like a target of
// the overlapped opcode, it inverted the lower bits and converted again.
func (x *x86Reader) relative(target, next uint32) uint32 {
	overlap := 8 * bits.Len32(x.seen)
	d := target - next
	// Twice is what real data need; hostile ones must come to an end too.
	for range 32 {
		if overlap == 0 || !isSign(byte(d>>(24-overlap))) {
			break
		}
		d = (d ^ (1<<(32-overlap) - 1)) - next
	}
	return uint32(int32(d<<7) >> 7)
}

// isSign says whether b is the top byte of a short distance.
func isSign(b byte) bool { return b == 0 || b == 0xff }
