package blk

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
)

const (
	base    = 0x100000
	ramSize = 32 << 20
)

var layouts = map[string]uint64{
	"split":            virtio.FeatureVersion1 | virtio.FeatureIndirectDesc,
	"split event_idx":  virtio.FeatureVersion1 | virtio.FeatureIndirectDesc | virtio.FeatureEventIdx,
	"packed event_idx": virtio.FeatureVersion1 | virtio.FeatureIndirectDesc | virtio.FeatureEventIdx | virtio.FeatureRingPacked,
}

// rig is a disk with a driver.
type rig struct {
	t          testing.TB
	d          *Device
	mem        *virtiotest.Memory
	drivers    []*virtiotest.Driver
	queues     []*virtio.Queue
	interrupts []chan struct{}
	reset      chan error
	features   uint64
	free       uint64 // gpa behind the rings
}

func (r *rig) ConfigChanged() {}
func (r *rig) NeedsReset(err error) {
	select {
	case r.reset <- err:
	default:
	}
}

// newImage makes a file of n bytes that differ from sector to sector.
func newImage(t testing.TB, n int) string {
	t.Helper()
	b := make([]byte, n)
	for i := 0; i+8 <= n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], uint64(i)*0x9e3779b97f4a7c15+1)
	}
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t testing.TB, c Config) *Device {
	t.Helper()
	d, err := Open(c, virtiotest.Log(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.Reset()
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func newRig(t testing.TB, d *Device, features uint64) *rig {
	t.Helper()
	r := &rig{t: t, d: d, reset: make(chan error, 1), features: features | d.Features()}
	r.mem = virtiotest.NewMemory(t, base, ramSize)
	r.free = base
	for _, size := range d.QueueSizes() {
		r.drivers = append(r.drivers, virtiotest.NewDriver(t, r.mem, r.free, size, r.features))
		r.free += virtiotest.RingBytes(size)
		r.interrupts = append(r.interrupts, make(chan struct{}, 1))
	}
	r.attach(d, nil)
	t.Cleanup(func() { r.d.Reset() }) // before the memory goes
	return r
}

// unmarked returns the pages behind the rings that differ from a snapshot and
// are not marked.
func (r *rig) unmarked(before []byte) []uint64 {
	return slices.DeleteFunc(r.mem.Unmarked(before), func(gpa uint64) bool { return gpa < r.free })
}

// attach gives the rig's guest another device, with fresh queues or those that
// were saved.
func (r *rig) attach(d *Device, saved []virtio.QueueState) {
	r.t.Helper()
	r.d, r.queues = d, nil
	for i, size := range d.QueueSizes() {
		irq := r.interrupts[i]
		q := virtio.NewQueue(r.mem, size, func() {
			select {
			case irq <- struct{}{}:
			default:
			}
		})
		if saved == nil {
			r.drivers[i].Start(q)
		} else if err := q.Start(saved[i], r.features); err != nil {
			r.t.Fatal(err)
		}
		r.queues = append(r.queues, q)
	}
	if err := d.Activate(r.features, r.queues, r); err != nil {
		r.t.Fatal(err)
	}
}

// request is one in flight.
type request struct {
	token  uint16
	status uint64 // gpa
	data   virtiotest.Buffer
}

// send makes a request available whose header, data and status lie at gpa, and
// kicks. in says that data is written by the device.
func (r *rig) send(queue int, gpa uint64, kind uint32, sector uint64, data virtiotest.Buffer, in bool) request {
	r.t.Helper()
	header := r.drivers[queue].Bytes(gpa, headerSize+1)
	binary.LittleEndian.PutUint32(header, kind)
	binary.LittleEndian.PutUint32(header[4:], 0)
	binary.LittleEndian.PutUint64(header[8:], sector)
	header[headerSize] = 0xff
	readable := []virtiotest.Buffer{{GPA: gpa, Len: headerSize}}
	writable := []virtiotest.Buffer{{GPA: gpa + headerSize, Len: 1}}
	if in {
		writable = append([]virtiotest.Buffer{data}, writable...)
	} else if data.Len > 0 {
		readable = append(readable, data)
	}
	token, ok := r.drivers[queue].Add(readable, writable)
	if !ok {
		r.t.Fatal("the ring is full")
	}
	if r.drivers[queue].WantsKick() {
		r.queues[queue].Signal()
	}
	return request{token, gpa + headerSize, data}
}

// wait returns the next request that comes back.
func (r *rig) wait(queue int) virtiotest.Used {
	r.t.Helper()
	for {
		if u, ok := r.drivers[queue].Used(); ok {
			return u
		}
		select {
		case <-r.interrupts[queue]:
		case err := <-r.reset:
			r.t.Fatalf("the device needs a reset: %v", err)
		}
	}
}

// do carries out one request on queue 0, whose data lies at r.free + a page,
// and returns its status and length.
func (r *rig) do(kind uint32, sector uint64, n int, in bool) (byte, uint32) {
	r.t.Helper()
	req := r.send(0, r.free, kind, sector, virtiotest.Buffer{GPA: r.free + 4096, Len: uint32(n)}, in)
	u := r.wait(0)
	if u.Token != req.token {
		r.t.Fatalf("request %d came back, %d was sent", u.Token, req.token)
	}
	return r.drivers[0].Bytes(req.status, 1)[0], u.Len
}

// data is where do's data lies.
func (r *rig) data(n int) []byte { return r.drivers[0].Bytes(r.free+4096, uint64(n)) }

func want(t testing.TB, what string, status byte, wanted byte) {
	t.Helper()
	if status != wanted {
		t.Fatalf("%s: status %d, want %d", what, status, wanted)
	}
}
