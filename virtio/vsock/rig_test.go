package vsock

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
)

const (
	base     = 0x100000
	guestCID = 42
	// rxBuffers and rxBytes are the buffers that the guest gives; those of
	// Linux are as long.
	rxBuffers = 16
	rxBytes   = 4096
	txBytes   = 65536 + headerBytes
)

var layouts = map[string]uint64{
	"split":  virtio.FeatureVersion1,
	"packed": virtio.FeatureVersion1 | virtio.FeatureRingPacked | virtio.FeatureEventIdx,
}

// rig is a device with a driver, and the guest's side of the protocol.
type rig struct {
	t          testing.TB
	d          *Device
	path       string
	mem        *virtiotest.Memory
	drivers    []*virtiotest.Driver
	queues     []*virtio.Queue
	interrupts []chan struct{}
	broken     chan error
	features   uint64
	free       uint64            // gpa behind the rings
	rx         map[uint16]uint64 // gpa of the buffers that are out
}

func (r *rig) ConfigChanged() { r.t.Error("the configuration has changed") }
func (r *rig) NeedsReset(err error) {
	select {
	case r.broken <- err:
	default:
	}
}

// newDevice makes a device that listens.
func newDevice(t testing.TB, path string) *Device {
	t.Helper()
	d, err := New(Config{CID: guestCID, Path: path}, virtiotest.Log(t, nil))
	check(t, err)
	check(t, d.Listen())
	t.Cleanup(func() { d.Reset(); check(t, d.Close()) })
	return d
}

// newRig makes a device whose driver has given receive buffers.
func newRig(t testing.TB, features uint64) *rig {
	t.Helper()
	r := newBareRig(t, features)
	for i := range rxBuffers {
		r.post(r.free + uint64(i)*rxBytes)
	}
	return r
}

func newBareRig(t testing.TB, features uint64) *rig {
	t.Helper()
	path := filepath.Join(t.TempDir(), "v")
	d := newDevice(t, path)
	r := &rig{t: t, path: path, broken: make(chan error, 1), features: features | d.Features(), free: base, rx: map[uint16]uint64{}}
	r.mem = virtiotest.NewMemory(t, base, 4<<20)
	for _, size := range d.QueueSizes() {
		r.drivers = append(r.drivers, virtiotest.NewDriver(t, r.mem, r.free, size, r.features))
		r.free += virtiotest.RingBytes(size)
		r.interrupts = append(r.interrupts, make(chan struct{}, 1))
	}
	r.attach(d, nil)
	t.Cleanup(func() { r.d.Reset() }) // before the memory goes
	return r
}

// attach gives the guest another device, with fresh queues or saved ones.
func (r *rig) attach(d *Device, saved []virtio.QueueState) {
	r.t.Helper()
	r.d, r.queues = d, nil
	for i, size := range d.QueueSizes() {
		irq := r.interrupts[i]
		q := virtio.NewQueue(r.mem, size, func() { signal(irq) })
		if saved == nil {
			r.drivers[i].Start(q)
		} else {
			check(r.t, q.Start(saved[i], r.features))
		}
		r.queues = append(r.queues, q)
	}
	check(r.t, d.Activate(r.features, r.queues, r))
	for _, q := range r.queues {
		q.Signal()
	}
}

// save pauses the device and saves its queues.
func (r *rig) save() []virtio.QueueState {
	r.t.Helper()
	check(r.t, r.d.Pause(context.Background()))
	var saved []virtio.QueueState
	for _, q := range r.queues {
		s, err := q.SaveState()
		check(r.t, err)
		saved = append(saved, s)
	}
	return saved
}

func (r *rig) add(queue int, readable, writable []virtiotest.Buffer) uint16 {
	r.t.Helper()
	token, ok := r.drivers[queue].Add(readable, writable)
	if !ok {
		r.t.Fatalf("queue %d is full", queue)
	}
	if r.drivers[queue].WantsKick() {
		r.queues[queue].Signal()
	}
	return token
}

// wait waits for a request to come back.
func (r *rig) wait(queue int) virtiotest.Used {
	r.t.Helper()
	timeout := time.After(patience)
	for {
		if u, ok := r.drivers[queue].Used(); ok {
			return u
		}
		select {
		case <-r.interrupts[queue]:
		case err := <-r.broken:
			r.t.Fatalf("the device needs a reset: %v", err)
		case <-timeout:
			r.t.Fatalf("queue %d: nothing comes", queue)
		}
	}
}

// post gives a receive buffer, cut as Linux does it: header, then payload.
func (r *rig) post(gpa uint64) {
	r.t.Helper()
	token := r.add(receiveQueue, nil, []virtiotest.Buffer{{GPA: gpa, Len: headerBytes}, {GPA: gpa + headerBytes, Len: rxBytes - headerBytes}})
	r.rx[token] = gpa
}

// txGPA is where packets of the guest are.
func (r *rig) txGPA() uint64 { return r.free + rxBuffers*rxBytes }

// send sends a packet of the guest, and waits until it is taken.
func (r *rig) send(h header, payload []byte) {
	r.t.Helper()
	r.submit(h, payload)
	r.wait(transmitQueue)
}

func (r *rig) submit(h header, payload []byte) {
	r.t.Helper()
	var b [headerBytes]byte
	h.encode(&b)
	gpa := r.txGPA()
	copy(r.drivers[transmitQueue].Bytes(gpa, headerBytes), b[:])
	buffers := []virtiotest.Buffer{{GPA: gpa, Len: headerBytes}}
	if n := len(payload); n > 0 {
		copy(r.drivers[transmitQueue].Bytes(gpa+headerBytes, uint64(n)), payload)
		buffers = append(buffers, virtiotest.Buffer{GPA: gpa + headerBytes, Len: uint32(n)})
	}
	r.add(transmitQueue, buffers, nil)
}

// recv waits for a packet for the guest.
func (r *rig) recv() (header, []byte) {
	r.t.Helper()
	u := r.wait(receiveQueue)
	return r.take(u)
}

// take reads the packet that has come and gives its buffer again.
func (r *rig) take(u virtiotest.Used) (header, []byte) {
	r.t.Helper()
	gpa, ok := r.rx[u.Token]
	if !ok || u.Len < headerBytes {
		r.t.Fatalf("a packet of %d bytes in buffer %d", u.Len, u.Token)
	}
	delete(r.rx, u.Token)
	b := append([]byte(nil), r.drivers[receiveQueue].Bytes(gpa, uint64(u.Len))...)
	r.post(gpa)
	h := decodeHeader((*[headerBytes]byte)(b))
	if payload := b[headerBytes:]; int(h.Len) != len(payload) {
		r.t.Fatalf("%d bytes of payload, the header says %d", len(payload), h.Len)
	}
	if h.DstCID != guestCID {
		r.t.Fatalf("a packet for CID %d", h.DstCID)
	}
	return h, b[headerBytes:]
}

// idle fails if there is a packet for the guest that was sent before now.
func (r *rig) idle() {
	r.t.Helper()
	// An unknown connection is answered behind all that is under way.
	r.send(header{SrcCID: guestCID, DstCID: hostCID, SrcPort: 7, DstPort: 7, Type: typeStream, Op: opData}, nil)
	if h, _ := r.recv(); h.Op != opReset || h.DstPort != 7 {
		r.t.Fatalf("an unexpected packet: %+v", h)
	}
}

// peer is the guest's end of a connection.
type peer struct {
	r           *rig
	host, guest uint32
	alloc, fwd  uint32 // what the guest says of its buffer
	sent        uint32
	hostAlloc   uint32 // what the device says of its
	hostFwd     uint32
	got         uint32 // bytes from the device
}

func (p *peer) packet(op uint16, flags uint32, payload []byte) header {
	p.sent += uint32(len(payload))
	return header{
		SrcCID: guestCID, DstCID: hostCID, SrcPort: p.guest, DstPort: p.host, Type: typeStream,
		Op: op, Flags: flags, Len: uint32(len(payload)), BufAlloc: p.alloc, FwdCnt: p.fwd,
	}
}

func (p *peer) send(op uint16, flags uint32, payload []byte) {
	p.r.t.Helper()
	p.r.send(p.packet(op, flags, payload), payload)
}

// expect waits for a packet of a kind.
func (p *peer) expect(op uint16) (header, []byte) {
	p.r.t.Helper()
	h, payload := p.r.recv()
	p.saw(h)
	if h.Op != op {
		p.r.t.Fatalf("operation %d, expected was %d: %+v", h.Op, op, h)
	}
	return h, payload
}

// saw checks and notes what is in each packet.
func (p *peer) saw(h header) {
	p.r.t.Helper()
	if h.SrcCID != hostCID || h.SrcPort != p.host || h.DstPort != p.guest || h.Type != typeStream {
		p.r.t.Fatalf("a packet of another connection: %+v", h)
	}
	if h.Op == opReset {
		return
	}
	p.hostAlloc, p.hostFwd = h.BufAlloc, h.FwdCnt
	if p.got += h.Len; p.fwd <= p.got && p.got-p.fwd > p.alloc {
		p.r.t.Fatalf("%d bytes in a buffer of %d", p.got-p.fwd, p.alloc)
	}
}

// credit is how much the guest may send.
func (p *peer) credit() uint32 { return p.hostAlloc - (p.sent - p.hostFwd) }

// read reads n bytes from the host, as they come.
func (p *peer) read(n int) string {
	p.r.t.Helper()
	var b []byte
	for len(b) < n {
		_, payload := p.expect(opData)
		b = append(b, payload...)
		p.fwd += uint32(len(payload))
	}
	return string(b)
}

// client is a program of the host.
type client struct {
	t testing.TB
	*net.UnixConn
	lines *bufio.Reader
}

func dial(t testing.TB, path string) *client {
	t.Helper()
	c, err := net.Dial("unix", path)
	check(t, err)
	return newClient(t, c)
}

func newClient(t testing.TB, c net.Conn) *client {
	t.Helper()
	t.Cleanup(func() { _ = c.Close() })
	check(t, c.SetDeadline(time.Now().Add(patience)))
	return &client{t, c.(*net.UnixConn), bufio.NewReader(c)}
}

func (c *client) say(text string) {
	c.t.Helper()
	_, err := io.WriteString(c, text)
	check(c.t, err)
}

func (c *client) want(text string) {
	c.t.Helper()
	b := make([]byte, len(text))
	if n, err := io.ReadFull(c.lines, b); err != nil || string(b) != text {
		c.t.Fatalf("read %q, %v; expected was %q", b[:n], err, text)
	}
}

// end expects nothing more.
func (c *client) end() {
	c.t.Helper()
	if b, err := io.ReadAll(c.lines); err != nil || len(b) > 0 {
		c.t.Fatalf("%q, %v; expected was the end", b, err)
	}
}

// connect connects a program of the host to the guest.
func (r *rig) connect(port uint32) (*client, *peer) {
	r.t.Helper()
	c := dial(r.t, r.path)
	c.say(fmt.Sprintf("CONNECT %d\n", port))
	h, _ := r.recv()
	if h.Op != opRequest || h.DstPort != port || h.SrcPort < firstPort || h.BufAlloc != bufferSize {
		r.t.Fatalf("%+v", h)
	}
	p := &peer{r: r, host: h.SrcPort, guest: port, alloc: bufferSize}
	p.saw(h)
	p.send(opResponse, 0, nil)
	line, err := c.lines.ReadString('\n')
	check(r.t, err)
	number, ok := strings.CutPrefix(strings.TrimSpace(line), "OK ")
	if got, err := strconv.ParseUint(number, 10, 32); !ok || err != nil || uint32(got) != p.host {
		r.t.Fatalf("%q, the port is %d", line, p.host)
	}
	return c, p
}

// listen makes a program of the host that the guest can connect to.
func (r *rig) listen(port uint32) *net.UnixListener {
	r.t.Helper()
	path := fmt.Sprintf("%s_%d", r.path, port)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	check(r.t, err)
	check(r.t, l.SetDeadline(time.Now().Add(patience)))
	r.t.Cleanup(func() { _ = l.Close() })
	return l
}

// request connects the guest to a program of the host.
func (r *rig) request(l *net.UnixListener, guest, host uint32) (*client, *peer) {
	r.t.Helper()
	p := &peer{r: r, host: host, guest: guest, alloc: bufferSize}
	p.send(opRequest, 0, nil)
	c, err := l.AcceptUnix()
	check(r.t, err)
	p.expect(opResponse)
	return newClient(r.t, c), p
}

// gone waits until the device knows of n connections.
func (r *rig) gone(n int) {
	r.t.Helper()
	for end := time.Now().Add(patience); r.d.Connections() != n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("%d connections, expected were %d", r.d.Connections(), n)
		}
	}
}

// released waits until ended connections hold nothing of the host's.
func (r *rig) released(n int) {
	r.t.Helper()
	held := func() int {
		r.d.serving.Lock()
		defer r.d.serving.Unlock()
		return len(r.d.all) + len(r.d.clients)
	}
	for end := time.Now().Add(patience); held() != n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("%d connections hold something, expected were %d", held(), n)
		}
	}
}

// needsReset waits for the device to give up.
func (r *rig) needsReset() {
	r.t.Helper()
	select {
	case <-r.broken:
	case <-time.After(patience):
		r.t.Fatal("the device does not need a reset")
	}
}

var (
	check    = testenv.Check
	patience = testenv.Patience
)

// each runs a test with both layouts of the rings.
func each(t *testing.T, f func(t *testing.T, r *rig)) {
	for name, features := range layouts {
		t.Run(name, func(t *testing.T) { f(t, newRig(t, features)) })
	}
}
