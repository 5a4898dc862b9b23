package migrate

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/govmm/govmm/mempage"
)

// The wire format; docs/migration.md has it as byte tables. All integers are
// little-endian. A connection begins with a hello from the source. Then both sides
// send frames: a header of 24 bytes and a payload.

const Version = 3 // of the migration protocol

const (
	helloSize  = 64
	headerSize = 24

	// maxSpan is the most pages that one PAGES or HASHES frame covers.
	maxSpan = 1024
	// maxControl bounds the payload of a CBOR message.
	maxControl = 64 << 10
	// maxConfig bounds CONFIG, which contains the kernel's image.
	maxConfig = 512 << 20
	// maxStorage bounds STORAGE.
	maxStorage = 1 << 20
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
	purposeMigrate purpose = 1 // the control connection of a migration
	purposeQuery   purpose = 2 // asks for the verdict on a session
	purposeData    purpose = 3 // one of the data connections
	purposeProbe   purpose = 4 // measures the link to the destination
	purposeMissing purpose = 5 // one of the connections for memory that comes later
)

// sessionID is the nonce that the source draws for one migration.
type sessionID [16]byte

func newSessionID() (id sessionID, err error) {
	if _, err := rand.Read(id[:]); err != nil {
		return id, fmt.Errorf("draw a session: %w", err)
	}
	return id, nil
}

func (s sessionID) String() string { return fmt.Sprintf("%x", s[:4]) }

// hello opens a connection: 64 bytes.
type hello struct {
	version, oldest uint16 // the newest version that the source speaks, and the oldest
	purpose         purpose
	renews          bool   // the data connection takes the place of the channel's last one
	channel         uint16 // a data connection's number, from 1; otherwise 0
	session         sessionID
	dataChannels    uint16    // data connections that the source asks for
	alive           uint16    // milliseconds from one ALIVE of the destination to the next; 0: the default
	previous        sessionID // that the source has given up for this one; zero: none
	set             uint32    // purposeMissing: numbers the sets of such connections, from 1
}

// helloRenews is a flag of a data connection's hello.
const helloRenews = 1

// newHello is a hello of this version.
func newHello(p purpose, session sessionID) hello {
	return hello{version: Version, oldest: Version, purpose: p, session: session}
}

func (h hello) encode() [helloSize]byte {
	var b [helloSize]byte
	copy(b[:8], helloMagic[:])
	le := binary.LittleEndian
	le.PutUint16(b[8:], h.version)
	le.PutUint16(b[10:], h.oldest)
	b[12] = byte(h.purpose)
	if h.renews {
		b[13] = helloRenews
	}
	le.PutUint16(b[14:], h.channel)
	copy(b[24:40], h.session[:])
	le.PutUint16(b[40:], h.dataChannels)
	le.PutUint16(b[42:], h.alive)
	copy(b[44:60], h.previous[:])
	le.PutUint32(b[60:], h.set)
	return b
}

var errNotGovmm = fmt.Errorf("%w: the peer does not speak the migration protocol", ErrProtocol)

// decodeHello reads a hello and checks it. Reserved bytes are ignored, so that a
// later version may use them.
func decodeHello(b *[helloSize]byte) (hello, error) {
	if [8]byte(b[:8]) != helloMagic {
		return hello{}, fmt.Errorf("%w (it began with %q)", errNotGovmm, b[:8])
	}
	le := binary.LittleEndian
	h := hello{
		version:      le.Uint16(b[8:]),
		oldest:       le.Uint16(b[10:]),
		purpose:      purpose(b[12]),
		renews:       b[13]&helloRenews != 0,
		channel:      le.Uint16(b[14:]),
		session:      sessionID(b[24:40]),
		dataChannels: le.Uint16(b[40:]),
		alive:        le.Uint16(b[42:]),
		previous:     sessionID(b[44:60]),
		set:          le.Uint32(b[60:]),
	}
	if h.session == (sessionID{}) {
		return h, fmt.Errorf("%w: hello without a session", ErrProtocol)
	}
	if h.version < Version || h.oldest > Version {
		return h, fmt.Errorf("the source speaks migration protocol versions %d to %d, this host version %d", h.oldest, h.version, Version)
	}
	if (h.purpose == purposeData || h.purpose == purposeMissing) != (h.channel != 0) {
		return h, fmt.Errorf("%w: hello with purpose %d and data channel %d", ErrProtocol, h.purpose, h.channel)
	}
	return h, nil
}

// granted is how many data connections a source gets.
func (h hello) granted() uint16 { return min(max(h.dataChannels, 1), MaxChannels) }

// frameType tells frames apart.
type frameType uint8

const (
	frameConfig  frameType = iota + 1 // source: the machine, opaque
	framePages                        // source: data and zero pages of one span
	frameRound                        // source: a round ended; destination: all before it has landed
	frameHashes                       // source: hashes of the pages of one span
	frameState                        // source: devices and vCPUs, opaque
	frameCommit                       // source: the right to run
	frameAbort                        // source: the migration ends, and why
	framePacked                       // source: as PAGES, its data pages compressed together
	frameStorage                      // source: what the guest's disks are known by, opaque
	frameUndo                         // source: the stop was undone, its STATE does not count
	frameRenew                        // source: the data channel goes on with its next connection
	frameBlocks                       // source: blocks of a disk
	frameMissing                      // both: pages that come later, or have not come
)

const (
	frameHelloOK  frameType = iota + 64 // destination: version and channels
	frameRefused                        // destination: every reason
	frameReady                          // destination: the machine is built
	framePrepared                       // destination: pages and state are loaded
	frameRunning                        // destination: the guest is here now
	frameFailed                         // destination: the migration ends, and why
	frameVerdict                        // destination: the answer to a query
	frameWant                           // destination: somebody waits for these pages
	frameStalls                         // destination: how long threads waited for pages
	frameWhole                          // destination: it lacks nothing any more; as STALLS
)

const (
	// frameProbe carries bytes that the receiver of a probe throws away.
	frameProbe frameType = 32
	// frameAlive says that a side lives, on the control connection, whatever it is at.
	frameAlive frameType = 33
)

// last reports whether no frame follows one of this type.
func (t frameType) last() bool {
	switch t {
	case frameCommit, frameAbort, frameRenew, frameRefused, frameRunning, frameFailed, frameVerdict, frameWhole:
		return true
	}
	return false
}

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
	case framePacked:
		return "PACKED"
	case frameUndo:
		return "UNDO"
	case frameRenew:
		return "RENEW"
	case frameBlocks:
		return "BLOCKS"
	case frameMissing:
		return "MISSING"
	case frameWant:
		return "WANT"
	case frameStalls:
		return "STALLS"
	case frameWhole:
		return "WHOLE"
	case frameStorage:
		return "STORAGE"
	case frameProbe:
		return "PROBE"
	case frameAlive:
		return "ALIVE"
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

const (
	flagPaused uint8 = 1 << 0 // STATE: the guest was paused at the source and stays so
	flagLater  uint8 = 1 << 1 // STATE: MISSING names the pages that come later
	flagLast   uint8 = 1 << 0 // ROUND: nothing of this stop follows on this data connection; UNDO: such ROUNDs were sent
	flagQuiet  uint8 = 1 << 1 // ROUND: the destination does not confirm it
	// flagDurable: ROUND: what came of the disks is durable when the destination confirms it.
	flagDurable uint8 = 1 << 2
	flagIdle    uint8 = 1 << 0 // ALIVE: it waits for the peer, and nothing moves
)

// header begins every frame: 24 bytes.
type header struct {
	typ    frameType
	flags  uint8
	slot   uint16 // PAGES, PACKED, HASHES: memory slot; BLOCKS: place of the disk in READY
	length uint32 // bytes of payload
	first  uint64 // PAGES, PACKED, HASHES: first page, a multiple of 64; ROUND: its number; STATE, PREPARED, COMMIT, UNDO: that of the stop
	count  uint32 // PAGES, PACKED, HASHES: pages in the span
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

// span checks the pages that a PAGES, PACKED or HASHES header names against the slots.
func (h header) span(slots []Slot) error {
	switch {
	case int(h.slot) >= len(slots):
		return fmt.Errorf("%w: %v for memory slot %d of %d", ErrProtocol, h.typ, h.slot, len(slots))
	case h.count == 0 || h.count > maxSpan:
		return fmt.Errorf("%w: %v of %d pages: must be between 1 and %d", ErrProtocol, h.typ, h.count, maxSpan)
	case h.first%64 != 0:
		return fmt.Errorf("%w: %v from page %#x: must be a multiple of 64", ErrProtocol, h.typ, h.first)
	case h.first >= slots[h.slot].Pages || uint64(h.count) > slots[h.slot].Pages-h.first:
		return fmt.Errorf("%w: %v of pages [%#x,+%#x) of memory slot %d, which has %#x", ErrProtocol, h.typ,
			h.first, h.count, h.slot, slots[h.slot].Pages)
	}
	return nil
}

// spanMeta follows the header of a PAGES or PACKED frame: which pages of the span
// come as data, and which read as zero. A page in neither stays as it is. The data
// pages follow, in order, or what they were packed to.
type spanMeta struct {
	buf        [2 * maxSpan / 8]byte
	data, zero [maxSpan / 64]uint64
}

func spanWords(count uint32) int { return (int(count) + 63) / 64 }

// encode returns the meta of a span of count pages.
func (m *spanMeta) encode(count uint32) []byte {
	w := spanWords(count)
	for i := range w {
		binary.LittleEndian.PutUint64(m.buf[i*8:], m.data[i])
		binary.LittleEndian.PutUint64(m.buf[(w+i)*8:], m.zero[i])
	}
	return m.buf[:2*w*8]
}

// bytes returns the buffer for the meta of a span of count pages.
func (m *spanMeta) bytes(count uint32) []byte { return m.buf[:2*spanWords(count)*8] }

// decode decodes the meta that was read into bytes, checks it against its header,
// and returns the number of data pages.
func (m *spanMeta) decode(h header) (pages int, err error) {
	w := spanWords(h.count)
	for i := range w {
		m.data[i] = binary.LittleEndian.Uint64(m.buf[i*8:])
		m.zero[i] = binary.LittleEndian.Uint64(m.buf[(w+i)*8:])
		if m.data[i]&m.zero[i] != 0 {
			return 0, fmt.Errorf("%w: %v with a page that is both data and zero", ErrProtocol, h.typ)
		}
		pages += bits.OnesCount64(m.data[i])
	}
	if tail := h.count % 64; tail != 0 && (m.data[w-1]|m.zero[w-1])>>tail != 0 {
		return 0, fmt.Errorf("%w: %v with a page beyond its span", ErrProtocol, h.typ)
	}
	meta, plain := uint64(2*w*8), uint64(pages)*mempage.Size
	length := uint64(h.length)
	switch {
	case h.typ == framePages && length != meta+plain:
		return 0, fmt.Errorf("%w: PAGES of %d bytes, expected %d by its bitmaps", ErrProtocol, length, meta+plain)
	case h.typ == framePacked && (length <= meta || length >= meta+plain):
		return 0, fmt.Errorf("%w: PACKED of %d bytes, expected more than %d and less than %d by its bitmaps",
			ErrProtocol, length, meta, meta+plain)
	}
	return pages, nil
}
