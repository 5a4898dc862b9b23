package vmm_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"log/slog"
	"net"
	"sync/atomic"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm"
)

// doorbell is a toy device: it counts how often it rang. Its driver rings by putting
// a request into its one queue, the program by calling Ring. The count travels with
// the guest.
type doorbell struct {
	rings atomic.Uint64
	loop  *virtio.Loop // nil when no driver is active
}

// Ring rings once.
func (d *doorbell) Ring() { d.rings.Add(1) }

// What follows is virtio.Device.

func (d *doorbell) ID() uint16                 { return 63 }
func (d *doorbell) Features() uint64           { return 0 }
func (d *doorbell) QueueSizes() []uint16       { return []uint16{8} }
func (d *doorbell) ReadConfig(uint32, []byte)  {}
func (d *doorbell) WriteConfig(uint32, []byte) {}

func (d *doorbell) Activate(_ uint64, queues []*virtio.Queue, n virtio.Notifier) error {
	d.loop = virtio.NewLoop(n)
	d.loop.Start(virtio.Task{Servers: []virtio.Server{{
		Queue: queues[0],
		Serve: func(*virtio.Chain) (written uint32, err error) { d.Ring(); return 0, nil },
	}}})
	return nil
}

func (d *doorbell) Reset() {
	d.loop.Stop()
	d.loop = nil
}

func (d *doorbell) ResetQueue(q *virtio.Queue)      { d.loop.ResetQueue(q) }
func (d *doorbell) Pause(ctx context.Context) error { return d.loop.Pause(ctx) }
func (d *doorbell) Resume() error                   { d.loop.Resume(); return nil }
func (d *doorbell) SaveState() ([]byte, error)      { return json.Marshal(d.rings.Load()) }
func (d *doorbell) LoadState(b []byte) error {
	var n uint64
	err := json.Unmarshal(b, &n)
	d.rings.Store(n)
	return err
}

// doorbellSpec is the device in a machine's description, which travels.
type doorbellSpec struct {
	Door string `cbor:"door"`

	device *doorbell // on this host, once it was opened
}

func (s *doorbellSpec) Kind() string   { return "doorbell" }
func (s *doorbellSpec) String() string { return "doorbell of " + s.Door }
func (s *doorbellSpec) Validate() error {
	if s.Door == "" {
		return fmt.Errorf("doorbell: which door?")
	}
	return nil
}

func (s *doorbellSpec) Open(*slog.Logger) (virtio.Backend, error) {
	s.device = &doorbell{}
	return &doorbellBackend{s}, nil
}

// doorbellBackend holds nothing of the host; it keeps the device through resets of
// the guest.
type doorbellBackend struct{ *doorbellSpec }

func (b *doorbellBackend) Attach(virtio.Guest) (virtio.Device, error) { return b.device, nil }
func (b *doorbellBackend) Info() virtio.Info {
	return doorbellInfo{Door: b.Door, Rings: b.device.rings.Load()}
}
func (b *doorbellBackend) Close() error { return nil }

type doorbellInfo struct {
	Door  string `json:"door"`
	Rings uint64 `json:"rings"`
}

func (i doorbellInfo) Lines() []string {
	return []string{fmt.Sprintf("%s, rang %d times", i.Door, i.Rings)}
}

// doorbells is the table's entry.
var doorbells = virtio.Kind{Name: "doorbell", Max: 1, New: func() virtio.Spec { return new(doorbellSpec) }}

// A program plugs a device of its own into a VM and migrates the VM with it. The
// destination knows the kind, too; one that does not refuses the guest.
func Example_device() {
	serial := &firstOutput{wrote: make(chan struct{})}
	front := &doorbellSpec{Door: "front"}
	source, err := vmm.NewVM(vmm.Config{
		Memory: 64 << 20, Serial: serial,
		Kinds:   []virtio.Kind{doorbells},
		Devices: []virtio.Spec{front},
	})
	if err != nil {
		log.Fatal(err)
	}
	left := run(source)
	<-serial.wrote
	front.device.Ring()
	front.device.Ring()

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	destination, err := vmm.NewReceiver(vmm.ReceiveConfig{Listener: listener, Kinds: []virtio.Kind{doorbells}})
	if err != nil {
		log.Fatal(err)
	}
	arrived := run(destination)
	if _, err := source.Migrate(context.Background(), listener.Addr().String(), migrate.Options{}); err != nil {
		log.Fatal(err)
	}
	<-left
	fmt.Println(destination.Info().Devices.Of("doorbell").Lines()[0])
	if err := destination.Stop(context.Background()); err != nil {
		log.Fatal(err)
	}
	<-arrived
	// Output: front, rang 2 times
}
