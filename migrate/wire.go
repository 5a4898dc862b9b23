package migrate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"

	"github.com/fxamacker/cbor/v2"
)

// The wire format; docs/migration.md has it as byte tables. All integers are
// little-endian. A connection begins with one hello from the source; after it
// both directions carry frames: a header of 24 bytes and a payload.

// Version is the protocol version that this package speaks; MinVersion the
// oldest that it still understands.
const (
	Version    = 1
	MinVersion = 1
)

const (
	helloSize  = 64
	headerSize = 24

	// maxSpan is the most pages that one PAGES or HASHES frame covers.
	maxSpan = 1024
	// maxControl bounds the payload of a CBOR message.
	maxControl = 64 << 10
	// maxConfig bounds CONFIG, which carries the kernel's image.
	maxConfig = 512 << 20
	// maxState bounds STATE.
	maxState = 64 << 20
	// maxReasons and maxReason bound what a refusal may say.
	maxReasons = 64
	maxReason  = 1024
)

var helloMagic = [8]byte{'G', 'O', 'V', 'M', 'M', 'L', 'M', '\n'}

// purpose says what a connection is for.
type purpose uint8

const (
	purposeMigrate purpose = 1 // channel 0 of a migration
	purposeQuery   purpose = 2 // asks for the verdict on a session
)

// sessionID is the nonce that the source draws for one migration.
type sessionID [16]byte

func (s sessionID) String() string { return fmt.Sprintf("%x", s[:4]) }

// Features that a source may offer; the destination answers with those that
// it will use.
const (
	featureVerifyPages uint32 = 1 << 0
	knownFeatures             = featureVerifyPages
)

// hello opens a connection: 64 bytes.
type hello struct {
	version, minVersion uint16
	purpose             purpose
	channel, channels   uint16 // this connection's index, and how many there will be
	features            uint32
	session             sessionID
}

func (h hello) encode() [helloSize]byte {
	var b [helloSize]byte
	copy(b[:8], helloMagic[:])
	le := binary.LittleEndian
	le.PutUint16(b[8:], h.version)
	le.PutUint16(b[10:], h.minVersion)
	b[12] = byte(h.purpose)
	le.PutUint16(b[14:], h.channel)
	le.PutUint16(b[16:], h.channels)
	le.PutUint32(b[20:], h.features)
	copy(b[24:40], h.session[:])
	return b
}

var errNotGovmm = fmt.Errorf("%w: the peer does not speak govmm's migration protocol", ErrProtocol)

// decodeHello checks what is the same in every version. Reserved bytes are
// ignored, so that a later version may use them.
func decodeHello(b *[helloSize]byte) (hello, error) {
	if [8]byte(b[:8]) != helloMagic {
		return hello{}, fmt.Errorf("%w (it began with %q)", errNotGovmm, b[:8])
	}
	le := binary.LittleEndian
	h := hello{
		version:    le.Uint16(b[8:]),
		minVersion: le.Uint16(b[10:]),
		purpose:    purpose(b[12]),
		channel:    le.Uint16(b[14:]),
		channels:   le.Uint16(b[16:]),
		features:   le.Uint32(b[20:]),
		session:    sessionID(b[24:40]),
	}
	if h.session == (sessionID{}) {
		return h, fmt.Errorf("%w: hello without a session", ErrProtocol)
	}
	if h.minVersion > h.version {
		return h, fmt.Errorf("%w: hello with versions %d to %d", ErrProtocol, h.minVersion, h.version)
	}
	return h, nil
}

// negotiate picks the newest version that both sides speak.
func (h hello) negotiate() (uint16, error) {
	v := min(h.version, Version)
	if v < h.minVersion || v < MinVersion {
		return 0, fmt.Errorf("protocol versions %d to %d are offered, %d to %d are spoken here",
			h.minVersion, h.version, MinVersion, Version)
	}
	if h.channels != 1 || h.channel != 0 {
		return 0, fmt.Errorf("%d channels are offered, version %d has one", h.channels, v)
	}
	return v, nil
}

// frameType tells frames apart.
type frameType uint8

const (
	frameConfig frameType = iota + 1 // source: the machine, opaque
	framePages                       // source: data and zero pages of one span
	frameRound                       // source: a round ended; destination: all before it has landed
	frameHashes                      // source: hashes of the pages of one span
	frameState                       // source: devices and vCPUs, opaque
	frameCommit                      // source: the right to run
	frameAbort                       // source: the migration ends, and why

	frameHelloOK  frameType = iota + 57 // 64.. destination: version and features
	frameRefused                        // destination: every reason
	frameReady                          // destination: the machine is built
	framePrepared                       // destination: pages and state are loaded
	frameRunning                        // destination: the guest is here now
	frameFailed                         // destination: the migration ends, and why
	frameVerdict                        // destination: the answer to a query
)

func (t frameType) String() string {
	switch t {
	case frameConfig:
		return "CONFIG"
	case framePages:
		return "PAGES"
	case frameRound:
		return "ROUND"
	case frameHashes:
		return "HASHES"
	case frameState:
		return "STATE"
	case frameCommit:
		return "COMMIT"
	case frameAbort:
		return "ABORT"
	case frameHelloOK:
		return "HELLO_OK"
	case frameRefused:
		return "REFUSED"
	case frameReady:
		return "READY"
	case framePrepared:
		return "PREPARED"
	case frameRunning:
		return "RUNNING"
	case frameFailed:
		return "FAILED"
	case frameVerdict:
		return "VERDICT"
	}
	return fmt.Sprintf("type %d", uint8(t))
}

// flagPaused is the flag of a STATE frame whose guest was paused at the
// source and stays so.
const flagPaused uint8 = 1 << 0

// header begins every frame: 24 bytes.
type header struct {
	typ    frameType
	flags  uint8
	slot   uint16 // PAGES, HASHES: memory slot
	length uint32 // bytes of payload
	first  uint64 // PAGES, HASHES: first page, a multiple of 64; ROUND: its number
	count  uint32 // PAGES, HASHES: pages in the span
}

func (h header) encode(b []byte) {
	le := binary.LittleEndian
	_ = b[headerSize-1]
	b[0], b[1] = byte(h.typ), h.flags
	le.PutUint16(b[2:], h.slot)
	le.PutUint32(b[4:], h.length)
	le.PutUint64(b[8:], h.first)
	le.PutUint32(b[16:], h.count)
	le.PutUint32(b[20:], 0)
}

func decodeHeader(b []byte) header {
	le := binary.LittleEndian
	_ = b[headerSize-1]
	return header{
		typ: frameType(b[0]), flags: b[1],
		slot: le.Uint16(b[2:]), length: le.Uint32(b[4:]),
		first: le.Uint64(b[8:]), count: le.Uint32(b[16:]),
	}
}

// span checks the pages that a PAGES or HASHES header names against the slots.
func (h header) span(slots []Slot) error {
	switch {
	case int(h.slot) >= len(slots):
		return fmt.Errorf("%w: %v for memory slot %d of %d", ErrProtocol, h.typ, h.slot, len(slots))
	case h.count == 0 || h.count > maxSpan:
		return fmt.Errorf("%w: %v of %d pages, 1 to %d are allowed", ErrProtocol, h.typ, h.count, maxSpan)
	case h.first%64 != 0:
		return fmt.Errorf("%w: %v from page %#x, not a multiple of 64", ErrProtocol, h.typ, h.first)
	case h.first >= slots[h.slot].Pages || uint64(h.count) > slots[h.slot].Pages-h.first:
		return fmt.Errorf("%w: %v of pages [%#x,+%#x) of memory slot %d, which has %#x", ErrProtocol, h.typ,
			h.first, h.count, h.slot, slots[h.slot].Pages)
	}
	return nil
}

// spanMeta is what follows the header of a PAGES frame: which pages of the
// span come as data, and which read as zero. A page in neither is not spoken
// of. Then come the data pages, in order.
type spanMeta struct {
	buf        [2 * maxSpan / 8]byte
	data, zero [maxSpan / 64]uint64
}

func spanWords(count uint32) int { return (int(count) + 63) / 64 }

// encode returns the bytes of the meta for a span of count pages.
func (m *spanMeta) encode(count uint32) []byte {
	w := spanWords(count)
	for i := range w {
		binary.LittleEndian.PutUint64(m.buf[i*8:], m.data[i])
		binary.LittleEndian.PutUint64(m.buf[(w+i)*8:], m.zero[i])
	}
	return m.buf[:2*w*8]
}

// bytes returns where to read the meta of a span of count pages.
func (m *spanMeta) bytes(count uint32) []byte { return m.buf[:2*spanWords(count)*8] }

// decode checks the meta that was read into bytes against its header.
func (m *spanMeta) decode(h header) error {
	w := spanWords(h.count)
	pages := 0
	for i := range w {
		m.data[i] = binary.LittleEndian.Uint64(m.buf[i*8:])
		m.zero[i] = binary.LittleEndian.Uint64(m.buf[(w+i)*8:])
		if m.data[i]&m.zero[i] != 0 {
			return fmt.Errorf("%w: PAGES with a page that is both data and zero", ErrProtocol)
		}
		pages += bits.OnesCount64(m.data[i])
	}
	if tail := h.count % 64; tail != 0 && (m.data[w-1]|m.zero[w-1])>>tail != 0 {
		return fmt.Errorf("%w: PAGES with a page beyond its span", ErrProtocol)
	}
	if want := uint64(2*w*8) + uint64(pages)*PageSize; uint64(h.length) != want {
		return fmt.Errorf("%w: PAGES of %d bytes, its bitmaps ask for %d", ErrProtocol, h.length, want)
	}
	return nil
}

// The CBOR messages. Fields may be added; unknown ones are ignored.
type (
	helloOK struct {
		Version  uint16 `cbor:"version"`
		Features uint32 `cbor:"features"`
	}
	refused struct {
		Reasons []string `cbor:"reasons"`
	}
	reason struct {
		Reason string `cbor:"reason"`
	}
	// tookMsg is the payload of PREPARED and RUNNING: how long the loading of
	// the state, or the start, took. Older peers send none.
	tookMsg struct {
		Microseconds uint64 `cbor:"us"`
	}
	verdictMsg struct {
		Verdict string `cbor:"verdict"`
	}
)

// Verdicts of a destination on a session.
const (
	verdictUnknown = "unknown" // never heard of it, or forgotten: says nothing
	verdictRunning = "running"
	verdictAborted = "aborted"
)

var controlDecoder = func() cbor.DecMode {
	m, err := cbor.DecOptions{
		MaxNestedLevels: 4, MaxArrayElements: 256, MaxMapPairs: 64,
		IndefLength: cbor.IndefLengthForbidden, UTF8: cbor.UTF8RejectInvalid,
	}.DecMode()
	if err != nil {
		panic(err) // constant options
	}
	return m
}()

func decodeControl(t frameType, b []byte, v any) error {
	if err := controlDecoder.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%w: %v: %v", ErrProtocol, t, err)
	}
	return nil
}

// decodeTook returns the milliseconds of a PREPARED or RUNNING; 0 if the peer
// does not say.
func decodeTook(r reply) (ms float64, err error) {
	if len(r.payload) == 0 {
		return 0, nil
	}
	var took tookMsg
	err = decodeControl(r.typ, r.payload, &took)
	return float64(took.Microseconds) / 1000, err
}

// clip bounds and cleans text for, or from, the peer: it ends up in one line
// of a terminal.
func clip(s string) string {
	out := make([]rune, 0, min(len(s), maxReason))
	for _, r := range s {
		if len(out) == maxReason {
			return string(out) + "…"
		}
		if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) {
			r = ' '
		}
		out = append(out, r)
	}
	return string(out)
}

// reasonsOf turns an error into what a refusal lists: the members of a joined
// error one by one.
func reasonsOf(err error) []string {
	var list []string
	var walk func(error)
	walk = func(e error) {
		if len(list) == maxReasons {
			return
		}
		if j, ok := e.(interface{ Unwrap() []error }); ok {
			for _, m := range j.Unwrap() {
				walk(m)
			}
			return
		}
		list = append(list, clip(e.Error()))
	}
	walk(err)
	return list
}

// refusal turns a peer's list back into one error.
func refusal(reasons []string) error {
	if len(reasons) == 0 {
		return fmt.Errorf("%w without a reason", ErrRefused)
	}
	errs := make([]error, 0, len(reasons))
	for _, r := range reasons[:min(len(reasons), maxReasons)] {
		errs = append(errs, errors.New(clip(r)))
	}
	return &RefusedError{Reasons: errs}
}

// RefusedError lists every incompatibility that the destination found. It
// matches [ErrRefused].
type RefusedError struct{ Reasons []error }

// Error joins the reasons into one line.
func (e *RefusedError) Error() string {
	s := ErrRefused.Error() + ": "
	for i, r := range e.Reasons {
		if i > 0 {
			s += "; "
		}
		s += r.Error()
	}
	return s
}

// Is makes errors.Is(err, ErrRefused) true.
func (e *RefusedError) Is(target error) bool { return target == ErrRefused }
