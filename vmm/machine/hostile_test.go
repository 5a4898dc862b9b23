package machine

import (
	"context"
	"encoding/binary"
	"path/filepath"
	"testing"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
	"github.com/govmm/govmm/virtio/vsock"
)

// A driver that breaks rules cannot keep a machine from being paused, saved and
// stopped. These drivers act through the registers of a real machine; the devices'
// own tests have more of them (virtiotest).

// endsSoon pauses the machine, saves its state and stops it.
func endsSoon(t *testing.T, m *Machine) {
	t.Helper()
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), testenv.Patience)
	defer cancel()
	check(t, m.Pause(ctx))
	_, err := m.saveState()
	check(t, err)
	t.Logf("paused and saved after %v", time.Since(began))
	check(t, m.Resume())
	m.Stop()
	check(t, m.Close())
}

// deviceBase returns where the registers of the device in a slot are.
func deviceBase(m *Machine, slot int) uint64 {
	var b [8]byte
	at := pci.ECAMBase + uint64(slot)<<15 + 0x10
	m.board.mmio.Read(at, b[:4])
	m.board.mmio.Read(at+4, b[4:])
	return binary.LittleEndian.Uint64(b[:]) &^ 0xf
}

func TestShortVsockPacketAndQueueReset(t *testing.T) {
	spec := testSpec(t, 1, vmtest.Obey)
	spec.Devices = []virtio.Spec{&vsock.Spec{Config: vsock.Config{CID: 77, Path: filepath.Join(t.TempDir(), "v")}}}
	m := fromSpec(t, spec, nil)
	check(t, m.Boot())
	check(t, m.Start(false))
	d := startVsockDriver(t, m)
	const tx, regQueueReset = 1, 58
	// A packet of 8 bytes is shorter than its header (virtio 1.2, 5.10.6).
	copy(d.drivers[tx].Bytes(vsockGive+tx<<12, 8), "\x01\x02\x03\x04\x05\x06\x07\x08")
	if _, ok := d.drivers[tx].Add([]virtiotest.Buffer{{GPA: vsockGive + tx<<12, Len: 8}}, nil); !ok {
		t.Fatal("the ring is full")
	}
	d.write(regNotify+4*tx, tx, 2)
	for deadline := vmtest.Within(t); d.status()&0x40 == 0; time.Sleep(time.Millisecond) { // DEVICE_NEEDS_RESET
		check(t, deadline.Err())
	}
	d.write(regQueueSelect, tx, 2)
	d.write(regQueueReset, 1, 2)
	endsSoon(t, m)
}

// TestManyScatteredBalloonPages: 64 requests, each of a million page numbers in an
// order in which no two are neighbours.
func TestManyScatteredBalloonPages(t *testing.T) {
	const pagesOf = 1 << 20
	spec := testSpec(t, 1, vmtest.Obey)
	spec.Memory, spec.Devices = 64<<20, []virtio.Spec{&balloon.Spec{}}
	m := fromSpec(t, spec, nil)
	check(t, m.Boot())
	check(t, m.Start(false))

	const list, rings, size, inflate = 16 << 20, 8 << 20, 64, 0
	numbers := make([]byte, 4*pagesOf)
	for i := range uint32(pagesOf) {
		binary.LittleEndian.PutUint32(numbers[4*i:], 0x2000+(i*5003)%0x2000) // 32 to 64 MiB
	}
	check(t, m.mem.WriteAt(numbers, list))

	base := deviceBase(m, 1)
	write := func(reg, v uint64, bytes int) {
		m.board.mmio.Write(base+reg, binary.LittleEndian.AppendUint64(nil, v)[:bytes])
	}
	write(regStatus, 0, 1)
	write(regStatus, 1|2, 1)
	write(regDriverSelect, 1, 4)
	write(regDriver, virtio.FeatureVersion1>>32, 4)
	write(regStatus, 1|2|8, 1)
	q := virtiotest.NewDriver(t, m.mem, rings, size, virtio.FeatureVersion1)
	s := q.State()
	write(regQueueSelect, inflate, 2)
	write(regQueueSize, size, 2)
	for j, gpa := range []uint64{s.Desc, s.Driver, s.Device} {
		write(regQueueDesc+8*uint64(j), gpa, 4)
		write(regQueueDesc+8*uint64(j)+4, gpa>>32, 4)
	}
	write(regQueueEnable, 1, 2)
	write(regStatus, 1|2|4|8, 1)
	for range size {
		if _, ok := q.Add([]virtiotest.Buffer{{GPA: list, Len: 4 * pagesOf}}, nil); !ok {
			t.Fatal("the ring is full")
		}
	}
	write(regNotify+4*inflate, inflate, 2)
	endsSoon(t, m)
}
