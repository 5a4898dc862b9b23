package balloon_test

import (
	"context"
	"encoding/binary"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
	"github.com/govmm/govmm/vmm/memory"
)

const (
	inflate = iota
	deflate
	stats
	hint
	report
	queues

	ramBytes  = 16 << 20
	queueSize = 128
	allOf     = balloon.FeatureStats | balloon.FeatureDeflateOnOOM | balloon.FeatureFreePageHint |
		balloon.FeaturePagePoison | balloon.FeatureReporting
)

// guestMemory is real guest memory, and behind it the memory of a test's
// driver.
type guestMemory struct {
	*memory.Memory
	ring *virtiotest.Memory

	mu   sync.Mutex
	runs []mempage.Range // punched
	fail error
}

func (m *guestMemory) Slice(gpa, n uint64) ([]byte, error) {
	if gpa >= m.ring.Base {
		return m.ring.Slice(gpa, n)
	}
	return m.Memory.Slice(gpa, n)
}

func (m *guestMemory) MarkDirty(gpa, n uint64) error {
	if gpa >= m.ring.Base {
		return m.ring.MarkDirty(gpa, n)
	}
	return m.Memory.MarkDirty(gpa, n)
}

func (m *guestMemory) ReadAt(p []byte, gpa uint64) error {
	if gpa >= m.ring.Base {
		return m.ring.ReadAt(p, gpa)
	}
	return m.Memory.ReadAt(p, gpa)
}

func (m *guestMemory) WriteAt(p []byte, gpa uint64) error {
	if gpa >= m.ring.Base {
		return m.ring.WriteAt(p, gpa)
	}
	return m.Memory.WriteAt(p, gpa)
}

func (m *guestMemory) Punch(gpa, n uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return m.fail
	}
	m.runs = append(m.runs, mempage.Range{GPA: gpa, Bytes: n})
	return m.Memory.Punch(gpa, n)
}

// punched returns the runs punched since the last call.
func (m *guestMemory) punched() []mempage.Range {
	m.mu.Lock()
	defer m.mu.Unlock()
	runs := m.runs
	m.runs = nil
	return runs
}

// dirty returns whether page n was marked since the last call.
func (m *guestMemory) dirty(t testing.TB, page uint64) bool {
	t.Helper()
	bitmap := make([]uint64, ramBytes/4096/64)
	check(t, m.FetchDirty(0, func(w int, word uint64) { bitmap[w] = word }))
	return bitmap[page/64]>>(page%64)&1 != 0
}

// rig is a balloon with a guest's driver.
type rig struct {
	t        testing.TB
	mem      *guestMemory
	b        *balloon.Balloon
	features uint64
	drivers  []*virtiotest.Driver
	queues   []*virtio.Queue
	irq      []chan struct{}
	changed  chan struct{} // configuration interrupts
	broken   chan error    // DEVICE_NEEDS_RESET
	logged   chan string
	data     uint64 // where requests may be
}

func newRig(t testing.TB, features uint64) *rig {
	t.Helper()
	r := &rig{t: t, features: features | virtio.FeatureVersion1 | virtio.FeatureIndirectDesc}
	const each = 4 << 20
	ram, err := memory.New(ramBytes, memory.Anonymous)
	check(t, err)
	t.Cleanup(func() { check(t, ram.Close()) })
	ring := virtiotest.NewMemory(t, ramBytes, 5<<20)
	r.mem = &guestMemory{Memory: ram, ring: ring}
	r.data = ramBytes + each
	r.newDevice()
	at := uint64(ramBytes)
	for range queues {
		r.drivers = append(r.drivers, virtiotest.NewDriver(t, ring, at, queueSize, r.features))
		at += virtiotest.RingBytes(queueSize)
	}
	if at > r.data {
		t.Fatalf("the rings end at %#x", at)
	}
	for i := range queues {
		r.drivers[i].Start(r.queues[i])
	}
	check(t, r.b.Activate(r.features, r.queues, r))
	t.Cleanup(func() { r.b.Reset() })
	return r
}

// newDevice makes a balloon and its queues, which are not started.
func (r *rig) newDevice() {
	r.t.Helper()
	r.changed, r.broken = make(chan struct{}, 64), make(chan error, 64)
	r.logged = make(chan string, 64)
	b, err := balloon.New(balloon.Config{
		Memory: r.mem, Puncher: r.mem, RAM: ramBytes,
		Log: virtiotest.Log(r.t, r.logged),
	})
	check(r.t, err)
	r.b, r.queues, r.irq = b, nil, nil
	for _, size := range b.QueueSizes() {
		irq := make(chan struct{}, 1)
		r.irq = append(r.irq, irq)
		r.queues = append(r.queues, virtio.NewQueue(r.mem, size, func() {
			select {
			case irq <- struct{}{}:
			default:
			}
		}))
	}
}

func (r *rig) ConfigChanged()       { r.changed <- struct{}{} }
func (r *rig) NeedsReset(err error) { r.broken <- err }

// send makes a request available and kicks.
func (r *rig) send(queue int, readable, writable []virtiotest.Buffer) {
	r.t.Helper()
	if _, ok := r.drivers[queue].Add(readable, writable); !ok {
		r.t.Fatalf("queue %d is full", queue)
	}
	r.queues[queue].Signal()
}

// wait returns when all of a queue's requests have come back.
func (r *rig) wait(queue int) {
	r.t.Helper()
	for {
		for {
			if _, ok := r.drivers[queue].Used(); !ok {
				break
			}
		}
		if r.drivers[queue].InFlight() == 0 {
			return
		}
		select {
		case <-r.irq[queue]:
		case <-time.After(10 * time.Second):
			r.t.Fatalf("queue %d: %d requests do not come back", queue, r.drivers[queue].InFlight())
		}
	}
}

// put places bytes for a request and returns their buffer.
func (r *rig) put(p []byte) virtiotest.Buffer {
	r.t.Helper()
	check(r.t, r.mem.WriteAt(p, r.data))
	return virtiotest.Buffer{GPA: r.data, Len: uint32(len(p))}
}

func (r *rig) pfns(queue int, pfns ...uint32) {
	r.t.Helper()
	r.send(queue, []virtiotest.Buffer{r.put(words(pfns...))}, nil)
	r.wait(queue)
}

func words(v ...uint32) []byte {
	var p []byte
	for _, n := range v {
		p = binary.LittleEndian.AppendUint32(p, n)
	}
	return p
}

// fill writes to every page of guest memory and forgets the marks.
func (r *rig) fill() {
	r.t.Helper()
	for gpa := uint64(0); gpa < ramBytes; gpa += 4096 {
		check(r.t, r.mem.WriteAt([]byte{1}, gpa))
	}
	r.mem.dirty(r.t, 0)
}

func (r *rig) noReset() {
	r.t.Helper()
	select {
	case err := <-r.broken:
		r.t.Fatalf("the device needs a reset: %v", err)
	default:
	}
}

func (r *rig) writeConfig(off uint32, v uint32) {
	r.b.WriteConfig(off, binary.LittleEndian.AppendUint32(nil, v))
}

func (r *rig) readConfig(off uint32) uint32 {
	var p [4]byte
	r.b.ReadConfig(off, p[:])
	return binary.LittleEndian.Uint32(p[:])
}

func ctx(t testing.TB) context.Context {
	c, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return c
}

var check = testenv.Check
