// Package console is the virtio console device: virtio 1.2, section 5.3, with
// one port, which Linux calls hvc0.
//
// Neither direction loses a byte, and neither makes a vCPU wait. A goroutine
// writes the guest's output from a queue; while the queue is full, output stays in
// the guest's ring. Input waits for buffers of the guest, and is read only when
// there is room for it.
//
//	c := console.New(console.Config{}, backend)
//	go c.Serve(ctx, backend) // input, until ctx ends
//	...                      // c behind a transport, the guest runs
//	c.Drain(ctx)
//	backend.Close()
//	c.Close()
package console

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/govmm/govmm/internal/charqueue"
	"github.com/govmm/govmm/virtio"
)

// Feature bits, section 5.3.3.
const (
	FeatureSize           uint64 = 1 << 0
	FeatureEmergencyWrite uint64 = 1 << 2
)

const (
	queueSize = 128
	// maxInput is how much input may wait for the guest, in bytes.
	maxInput = charqueue.MaxInput

	receiveQueue  = 0
	transmitQueue = 1

	// struct virtio_console_config, section 5.3.4.
	configBytes  = 12
	offColumns   = 0
	offRows      = 2
	offPorts     = 4
	offEmergency = 8
)

// Config says what the console is. The zero value is fine.
type Config struct {
	// Columns and Rows are the terminal's size in characters; 0 is unknown.
	Columns, Rows uint16
}

var _ virtio.Device = (*Device)(nil)

// Device is the console. It implements [virtio.Device].
type Device struct {
	out  *charqueue.Output
	wake chan struct{} // has a value when input has come, or there is room for output again
	room chan struct{} // has a value when there is room for input again

	loop *virtio.Loop // nil when not active; belongs to the transport's calls

	// serving is held while queues are served, which never waits. It guards all
	// below.
	serving  sync.Mutex
	features uint64 // negotiated
	notify   virtio.Notifier
	input    []byte
	offset   int // bytes of the transmit queue's next chain that are in out already
	size     Config
	copied   [1024]byte
}

// New makes a console whose output goes to w. [Device.Close] ends it.
func New(c Config, w io.Writer) *Device {
	wake := make(chan struct{}, 1)
	return &Device{out: charqueue.NewOutput(w, 1, func() { signal(wake) }), size: c, wake: wake, room: make(chan struct{}, 1)}
}

// ID implements [virtio.Device].
func (d *Device) ID() uint16 { return virtio.IDConsole }

// Features implements [virtio.Device].
func (d *Device) Features() uint64 { return FeatureSize | FeatureEmergencyWrite }

// QueueSizes implements [virtio.Device]: receiveq and transmitq of port 0
// (5.3.2).
func (d *Device) QueueSizes() []uint16 { return []uint16{queueSize, queueSize} }

// ReadConfig implements [virtio.Device].
func (d *Device) ReadConfig(off uint32, p []byte) {
	d.serving.Lock()
	size := d.size
	d.serving.Unlock()
	var b [configBytes]byte
	binary.LittleEndian.PutUint16(b[offColumns:], size.Columns)
	binary.LittleEndian.PutUint16(b[offRows:], size.Rows)
	binary.LittleEndian.PutUint32(b[offPorts:], 1)
	if off < configBytes {
		copy(p, b[off:])
	}
}

// WriteConfig implements [virtio.Device]. A write to emerg_wr is a character of
// output, in every state of the device (5.3.4). It is dropped if there is no room.
func (d *Device) WriteConfig(off uint32, p []byte) {
	if off <= offEmergency && uint64(off)+uint64(len(p)) > offEmergency {
		d.out.Put(p[offEmergency-off:][:1])
	}
}

// SetSize changes the terminal's size in characters, and tells the guest.
func (d *Device) SetSize(columns, rows uint16) {
	d.serving.Lock()
	changed := d.size != Config{columns, rows}
	d.size = Config{columns, rows}
	notify := d.notify
	tell := changed && notify != nil && d.features&FeatureSize != 0
	d.serving.Unlock()
	if tell {
		notify.ConfigChanged()
	}
}

// Activate implements [virtio.Device].
func (d *Device) Activate(features uint64, queues []*virtio.Queue, n virtio.Notifier) error {
	if d.loop != nil || len(queues) != 2 {
		return fmt.Errorf("console: activated with %d queues, or twice", len(queues))
	}
	d.serving.Lock()
	d.features, d.notify = features, n
	d.serving.Unlock()
	d.out.Hold(false)
	d.loop = virtio.NewLoop(n)
	d.loop.Start(virtio.Task{
		Servers: []virtio.Server{
			{Queue: queues[receiveQueue], Ready: d.canReceive, Serve: d.receive},
			{Queue: queues[transmitQueue], Ready: d.canTransmit, Gather: d.transmit, Reset: d.forget},
		},
		Wake: d.wake,
		Lock: &d.serving,
	})
	return nil
}

func (d *Device) canReceive() time.Duration {
	if len(d.input) == 0 {
		return virtio.Never
	}
	return 0
}

// receive moves input into the guest's buffer. serving is held.
func (d *Device) receive(c *virtio.Chain) (uint32, error) {
	n := c.WriteAt(d.input, 0)
	d.input = d.input[:copy(d.input, d.input[n:])]
	signal(d.room)
	return uint32(n), nil
}

func (d *Device) canTransmit() time.Duration {
	if d.out.Room() == 0 {
		return virtio.Never
	}
	return 0
}

// transmit moves the guest's output into out. A chain that does not fit is put
// back, and goes on at offset when there is room. serving is held.
func (d *Device) transmit(chains []virtio.Chain, written []uint32) (int, error) {
	c := &chains[0]
	for d.offset < c.ReadableLen() {
		n := c.ReadAt(d.copied[:], d.offset)
		put := d.out.Put(d.copied[:n])
		d.offset += put
		if put < n {
			return virtio.PutBack, nil
		}
	}
	d.offset, written[0] = 0, 0
	return 1, nil
}

// forget discards the offset: the driver has reset the transmit queue. serving is
// held.
func (d *Device) forget() { d.offset = 0 }

// ResetQueue implements [virtio.Device].
func (d *Device) ResetQueue(q *virtio.Queue) { d.loop.ResetQueue(q) }

// Reset implements [virtio.Device]. Input that the guest has not read stays.
func (d *Device) Reset() {
	d.loop.Stop()
	d.loop = nil
	d.serving.Lock()
	defer d.serving.Unlock()
	d.features, d.notify, d.offset = 0, nil, 0
	d.out.Hold(false)
}

// Pause implements [virtio.Device]. A line that the guest has begun and not ended
// is held, so that it is printed whole where the guest goes on.
func (d *Device) Pause(ctx context.Context) error {
	d.out.Hold(true)
	if err := d.loop.Pause(ctx); err != nil {
		d.out.Hold(false)
		return fmt.Errorf("console: %w", err)
	}
	return nil
}

// Resume implements [virtio.Device].
func (d *Device) Resume() error {
	d.out.Hold(false)
	d.loop.Resume()
	return nil
}

// Drain waits until the writer has taken all output, except for a line that is
// held, or until ctx ends.
func (d *Device) Drain(ctx context.Context) error {
	if err := d.out.Drain(ctx); err != nil {
		return fmt.Errorf("console: %w", err)
	}
	return nil
}

// Close ends the output. What the writer has not taken is lost
// ([Device.Drain] first). It waits for a Write under way: close a writer that
// is stuck before the console. It returns the first error of the writer.
func (d *Device) Close() error {
	if err := d.out.Close(); err != nil {
		return fmt.Errorf("console: output: %w", err)
	}
	return nil
}

// signal makes whoever waits for c look again.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
