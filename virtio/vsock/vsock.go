// Package vsock is the virtio socket device: virtio 1.2, section 5.10, stream
// sockets only. The host's side of each connection is a unix socket, in the
// way of Firecracker:
//
//   - A program of the host connects to the device's socket PATH, writes
//     "CONNECT PORT\n", reads "OK HOSTPORT\n", and is connected to who listens
//     at PORT in the guest. If nobody does, the connection is closed.
//   - When the guest connects to PORT of the host (CID 2), the device connects
//     to the unix socket PATH_PORT. If nobody listens there the guest is
//     refused.
//
// Usage:
//
//	d, err := vsock.New(vsock.Config{CID: 3, Path: "vm.vsock"}, slog.Default())
//	err = d.Listen()                 // the socket is there now
//	...                              // d behind a transport, the guest runs
//	d.Pause(ctx); d.Unlisten()       // another device may have the socket
//	d.Close()
//
// The socket follows the right to run the guest through a migration, like a
// disk's lock. Connections do not: the guest that runs elsewhere is told that
// they are gone. See docs/vsock.md.
//
// Files: packet.go is the wire format, serve.go moves packets, conn.go is a
// connection, host.go its host's side, listen.go the socket, state.go what
// travels.
package vsock

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/govmm/govmm/internal/unixsock"
	"github.com/govmm/govmm/virtio"
)

// FeatureStream is the device's feature bit: it has stream sockets (5.10.3).
const FeatureStream uint64 = 1 << 0

const (
	queueSize = 256

	receiveQueue  = 0
	transmitQueue = 1
	eventQueue    = 2

	// maxConnections bounds connections, those of the host that are not made
	// yet and those that are only being emptied among them.
	maxConnections = 512
	// bufferSize is how many bytes the guest may have sent on a connection
	// that the host's program has not read (buf_alloc, 5.10.6.3).
	bufferSize = 64 << 10
	// readSize is how much is read from the host's program at once.
	readSize = 32 << 10
	// maxResets is how many refusals may wait for the guest to take them. When
	// there are more the guest's packets wait, too (5.10.6.1).
	maxResets = 256
)

var _ virtio.Device = (*Device)(nil)

// Device is the socket device. It implements [virtio.Device].
type Device struct {
	config Config
	log    *slog.Logger
	wake   chan struct{} // there is something for the guest

	answerTime time.Duration // the constant of that name, but in tests

	// listenMu guards listener, and orders Listen and Unlisten.
	listenMu  sync.Mutex
	listener  *unixsock.Listener // nil: not listening
	accepting sync.WaitGroup

	loop *virtio.Loop // nil when not active; belongs to the transport's calls

	tasks sync.WaitGroup // goroutines of connections

	// serving is held while queues are served and connections change, which
	// waits for nothing; it guards all below.
	serving sync.Mutex
	active  bool // there is a driver, which has broken no rule
	closed  bool

	clients  map[*net.UnixConn]bool // that have not said where to
	all      map[*conn]bool         // connections that hold anything of the host
	conns    map[ports]*conn        // those that the guest knows
	ready    []*conn                // those with something for the guest, by turns
	resets   []Reset                // to send to the guest
	lost     bool                   // the guest has to be told that connections are gone
	nextPort uint32                 // of the host's next connection
}

// firstPort is where ports of the host's connections begin: above those that
// anybody listens on.
const firstPort = 1 << 30

// New makes a device that does not listen yet. If log is nil, nothing is logged.
func New(c Config, log *slog.Logger) (*Device, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("vsock: %w", err)
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Device{
		config: c, log: log, wake: make(chan struct{}, 1), answerTime: answerTime, nextPort: firstPort,
		clients: map[*net.UnixConn]bool{}, all: map[*conn]bool{}, conns: map[ports]*conn{},
	}, nil
}

// Config is what the device was made with.
func (d *Device) Config() Config { return d.config }

// Connections is how many there are now, either way.
func (d *Device) Connections() int {
	d.serving.Lock()
	defer d.serving.Unlock()
	return len(d.conns)
}

// ID implements [virtio.Device].
func (d *Device) ID() uint16 { return virtio.IDVsock }

// Features implements [virtio.Device].
func (d *Device) Features() uint64 { return FeatureStream }

// QueueSizes implements [virtio.Device]: rx, tx and event (5.10.2).
func (d *Device) QueueSizes() []uint16 { return []uint16{queueSize, queueSize, queueSize} }

// ReadConfig implements [virtio.Device]: struct virtio_vsock_config (5.10.4) is
// the guest's CID.
func (d *Device) ReadConfig(off uint32, p []byte) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(d.config.GuestCID()))
	if off < uint32(len(b)) {
		copy(p, b[off:])
	}
}

// WriteConfig implements [virtio.Device]: nothing is writable.
func (d *Device) WriteConfig(uint32, []byte) {}

// Activate implements [virtio.Device].
func (d *Device) Activate(_ uint64, queues []*virtio.Queue, n virtio.Notifier) error {
	if d.loop != nil || len(queues) != 3 {
		return fmt.Errorf("vsock: activated with %d queues, or twice", len(queues))
	}
	d.serving.Lock()
	d.active = true
	d.serving.Unlock()
	d.loop = virtio.NewLoop(notifier{n, d})
	d.loop.Start(virtio.Task{
		Servers: []virtio.Server{
			{Queue: queues[eventQueue], Ready: d.canTell, Serve: d.tell},
			{Queue: queues[transmitQueue], Ready: d.canTransmit, Serve: d.transmit},
			{Queue: queues[receiveQueue], Ready: d.canReceive, Serve: d.receive},
		},
		Wake: d.wake,
		Lock: &d.serving,
	})
	return nil
}

// notifier ends the connections of a driver that breaks a rule.
type notifier struct {
	virtio.Notifier
	d *Device
}

// NeedsReset implements [virtio.Notifier].
func (n notifier) NeedsReset(err error) {
	n.d.serving.Lock()
	n.d.active = false
	n.d.endAll()
	n.d.serving.Unlock()
	n.Notifier.NeedsReset(err)
}

// Reset implements [virtio.Device]: all connections end. What the guest has
// sent on them before still goes to the host's programs.
func (d *Device) Reset() {
	d.loop.Stop()
	d.loop = nil
	d.serving.Lock()
	defer d.serving.Unlock()
	d.endAll()
	d.active = false
	d.ready, d.resets, d.lost = nil, nil, false
}

// endAll ends all connections without telling the guest. serving is held.
func (d *Device) endAll() {
	for _, c := range d.conns {
		c.end(true)
	}
}

// Pause implements [virtio.Device]. Connections stay; what comes on them from
// the host waits.
func (d *Device) Pause(ctx context.Context) error {
	if err := d.loop.Pause(ctx); err != nil {
		return fmt.Errorf("vsock: %w", err)
	}
	return nil
}

// Resume implements [virtio.Device].
func (d *Device) Resume() error {
	d.loop.Resume()
	return nil
}

// ResetQueue implements [virtio.Device].
func (d *Device) ResetQueue(q *virtio.Queue) { d.loop.ResetQueue(q) }

// Close implements [virtio.Device]. Programs of the host that have not read all
// that the guest has sent get a second for it.
func (d *Device) Close() error {
	err := d.Unlisten()
	d.serving.Lock()
	d.closed = true
	for c := range d.clients {
		_ = c.Close() // it is not the guest's yet
	}
	for c := range d.all {
		c.hurry()
	}
	d.serving.Unlock()
	d.tasks.Wait()
	return err
}

// signal makes whoever waits for c look again.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
