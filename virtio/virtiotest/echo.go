package virtiotest

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/govmm/govmm/virtio"
)

// IDEcho is a device type that the standard does not define.
const IDEcho uint16 = 0x3f

// Echo is a minimal device: it copies the readable bytes of a request to the
// writable ones. Its configuration is 8 bytes that the driver may write.
type Echo struct {
	Queues []uint16 // sizes
	Err    error    // if not nil, every request fails with it

	loop *virtio.Loop

	config sync.Mutex // guards bytes
	bytes  [8]byte

	// Features and Notifier are what the last Activate was given.
	Negotiated uint64
	Notifier   virtio.Notifier
}

var _ virtio.Device = (*Echo)(nil)

// ID is IDEcho.
func (e *Echo) ID() uint16 { return IDEcho }

// Features is one feature without a meaning.
func (e *Echo) Features() uint64 { return 1 }

// QueueSizes are those of Queues.
func (e *Echo) QueueSizes() []uint16 { return e.Queues }

// ReadConfig reads the 8 bytes.
func (e *Echo) ReadConfig(off uint32, p []byte) {
	e.config.Lock()
	defer e.config.Unlock()
	if off < 8 {
		copy(p, e.bytes[off:])
	}
}

// WriteConfig writes them.
func (e *Echo) WriteConfig(off uint32, p []byte) {
	e.config.Lock()
	defer e.config.Unlock()
	if off < 8 {
		copy(e.bytes[off:], p)
	}
}

// Activate starts a task for each queue.
func (e *Echo) Activate(features uint64, queues []*virtio.Queue, n virtio.Notifier) error {
	e.Negotiated, e.Notifier = features, n
	e.loop = virtio.NewLoop(n)
	for _, q := range queues {
		e.loop.Start(virtio.Task{Servers: []virtio.Server{{Queue: q, Serve: e.echo}}})
	}
	return nil
}

// echo copies readable bytes to writable ones.
func (e *Echo) echo(c *virtio.Chain) (uint32, error) {
	if e.Err != nil {
		return 0, e.Err
	}
	done := 0
	for _, s := range c.Readable {
		done += c.WriteAt(s.Buf, done)
	}
	return uint32(done), nil
}

// Reset stops the tasks.
func (e *Echo) Reset() {
	e.loop.Stop()
	e.loop = nil
	e.config.Lock()
	defer e.config.Unlock()
	e.bytes = [8]byte{}
}

// ResetQueue drops nothing: nothing is kept.
func (e *Echo) ResetQueue(q *virtio.Queue) { e.loop.ResetQueue(q) }

// Pause pauses them.
func (e *Echo) Pause(ctx context.Context) error { return e.loop.Pause(ctx) }

// Resume resumes them.
func (e *Echo) Resume() error { e.loop.Resume(); return nil }

// SaveState returns the 8 bytes.
func (e *Echo) SaveState() ([]byte, error) {
	e.config.Lock()
	defer e.config.Unlock()
	return append([]byte(nil), e.bytes[:]...), nil
}

// LoadState takes them.
func (e *Echo) LoadState(s []byte) error {
	if len(s) != 8 {
		return fmt.Errorf("echo state of %d bytes", len(s))
	}
	e.config.Lock()
	defer e.config.Unlock()
	copy(e.bytes[:], s)
	return nil
}

// Set changes the configuration from the host's side.
func (e *Echo) Set(v uint64) {
	e.config.Lock()
	binary.LittleEndian.PutUint64(e.bytes[:], v)
	e.config.Unlock()
	e.Notifier.ConfigChanged()
}
