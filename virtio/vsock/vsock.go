// Package vsock is the virtio socket device: virtio 1.2, section 5.10, stream
// sockets only. The host's side of each connection is a unix socket, as in
// Firecracker:
//
//   - A program of the host connects to the device's socket PATH, writes
//     "CONNECT PORT\n", reads "OK HOSTPORT\n", and is connected to the program
//     that listens at PORT in the guest. If none does, the connection is closed.
//   - When the guest connects to PORT of the host (CID 2), the device connects
//     to the unix socket PATH_PORT. If no program listens there, the guest's
//     connection is refused.
//
// Usage:
//
//	d, err := vsock.New(vsock.Config{CID: 3, Path: "vm.vsock"}, slog.Default())
//	err = d.Listen()                 // makes the socket
//	...                              // d behind a transport, the guest runs
//	d.Pause(ctx); d.Unlisten()       // removes the socket
//	d.Close()
//
// The socket follows the right to run the guest in a migration, like a disk's
// lock. Connections do not move: the guest is told at the destination that they
// have ended. See docs/vsock.md.
//
// Files: packet.go is the wire format, serve.go moves packets, conn.go is a
// connection, host.go its side of the host, listen.go the socket, state.go what
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

	// maxConnections limits connections, including those of the host that are
	// not made yet, and those that have ended and are being drained. The files
	// that the process may open limit them further.
	maxConnections = 512
	// bufferSize is how many bytes of a connection the guest may send before
	// the host's program reads them (buf_alloc, 5.10.6.3).
	bufferSize = 64 << 10
	// readSize is how much is read from a program of the host at once.
	readSize = 32 << 10
	// maxResets is how many refusals may wait for receive buffers of the guest.
	// Beyond that the guest's packets wait in their queue (5.10.6.1).
	maxResets = 256
)

var _ virtio.Device = (*Device)(nil)

// Device is the socket device. It implements [virtio.Device].
type Device struct {
	config Config
	log    *slog.Logger
	wake   chan struct{} // has a value when there is something for the guest

	answerTime time.Duration // the constant of that name, except in tests
	most       int           // connections: see budget

	// listenMu guards listener, and orders Listen and Unlisten.
	listenMu  sync.Mutex
	listener  *unixsock.Listener // nil: not listening
	accepting sync.WaitGroup

	loop *virtio.Loop // nil when not active; belongs to the transport's calls

	tasks sync.WaitGroup // goroutines of connections

	// serving is held while queues are served and connections change, which
	// never waits. It guards all below.
	serving sync.Mutex
	active  bool // there is a driver, and it has broken no rule
	closed  bool

	clients  map[*net.UnixConn]bool // connections of the host before CONNECT
	all      map[*conn]bool         // connections with a socket or a goroutine
	conns    map[ports]*conn        // connections that the guest knows
	ready    []*conn                // connections with something for the guest, in turn
	resets   []Reset                // to send to the guest
	lost     bool                   // TRANSPORT_RESET is due
	nextPort uint32                 // of the host's next connection
}

// firstPort is the first port of the host's connections, above the ports that
// programs usually listen on.
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
		config: c, log: log, wake: make(chan struct{}, 1), answerTime: answerTime, most: budget(), nextPort: firstPort,
		clients: map[*net.UnixConn]bool{}, all: map[*conn]bool{}, conns: map[ports]*conn{},
	}, nil
}

// Config is the configuration of the device.
func (d *Device) Config() Config { return d.config }

// Connections is the current number of connections in both directions.
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

// Reset implements [virtio.Device]. All connections end; what the guest has sent
// before still goes to the host's programs.
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

// Pause implements [virtio.Device]. Connections stay; data from the host waits.
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

// Close closes the device. Programs of the host get a second to read what the
// guest has sent.
func (d *Device) Close() error {
	err := d.Unlisten()
	d.serving.Lock()
	d.closed = true
	for c := range d.clients {
		_ = c.Close() // the guest does not know it yet
	}
	for c := range d.all {
		c.hurry()
	}
	d.serving.Unlock()
	d.tasks.Wait()
	return err
}

// signal puts a value into c, which has room for one, if there is none.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
