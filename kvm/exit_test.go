package kvm

import (
	"encoding/binary"
	"reflect"
	"testing"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"github.com/govmm/govmm/mempage"
)

// fakeExit returns a vCPU whose shared area is written by the test.
func fakeExit(size int, put func(union []byte)) *VCPU {
	v := &VCPU{area: make([]byte, size)}
	put(v.union())
	return v
}

func put32(u []byte, at int, n uint32) { binary.LittleEndian.PutUint32(u[at:], n) }
func put64(u []byte, at int, n uint64) { binary.LittleEndian.PutUint64(u[at:], n) }

// Any numbers that do not fit into the shared area give no data.
func TestIOBounds(t *testing.T) {
	const area = 2 * mempage.Size
	for _, c := range []struct {
		size   byte
		count  uint32
		offset uint64
		want   int // length of Data, -1 for none
	}{
		{1, 1, mempage.Size, 1},
		{4, 1024, mempage.Size, mempage.Size},
		{4, 1025, mempage.Size, -1},
		{1, 1, area, -1},
		{1, 1, area - 1, 1},
		{2, 1, area - 1, -1},
		{0, 0, area, 0},
		{255, 1<<32 - 1, mempage.Size, -1},
		{1, 1, 1<<64 - 1, -1},
		{4, 1<<32 - 1, 1<<64 - 4, -1},
	} {
		v := fakeExit(area, func(u []byte) {
			u[0], u[1] = gokvm.EXITIOOUT, c.size
			put32(u, 4, c.count)
			put64(u, 8, c.offset)
		})
		got := len(v.IO().Data)
		if v.IO().Data == nil {
			got = -1
		}
		if got != c.want {
			t.Errorf("size %d count %d offset %#x: %d bytes, want %d", c.size, c.count, c.offset, got, c.want)
		}
	}
}

func TestMMIOBounds(t *testing.T) {
	for _, n := range []uint32{0, 1, 8, 9, 1<<32 - 1} {
		v := fakeExit(mempage.Size, func(u []byte) {
			put64(u, 0, 0xfee00000)
			put32(u, 16, n)
			u[20] = 1
		})
		m := v.MMIO()
		want := int(n)
		if n > 8 {
			want = 0
		}
		if m.Addr != 0xfee00000 || !m.Write || len(m.Data) != want || cap(m.Data) != want {
			t.Errorf("length %d: %+v", n, m)
		}
	}
}

func TestInternalError(t *testing.T) {
	v := fakeExit(mempage.Size, func(u []byte) {
		put32(u, 0, InternalErrorEmulation)
		put32(u, 4, 4)
		put64(u, 8, emulationHasBytes)
		copy(u[16:], []byte{3, 0x0f, 0xc7, 0xf0, 0xff})
	})
	if got, want := v.InternalError().String(), "KVM cannot emulate the instruction that begins 0f c7 f0"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	v.union()[16] = 200
	if got := v.InternalError().Instruction(); len(got) != 15 {
		t.Errorf("%d bytes of instruction", len(got))
	}
	put32(v.union(), 4, 1<<32-1)
	if got := v.InternalError().Data; len(got) != 16 {
		t.Errorf("%d words of data", len(got))
	}
	put32(v.union(), 4, 0)
	if got, want := v.InternalError().String(), "KVM cannot emulate an instruction"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	put32(v.union(), 0, InternalErrorDeliveryEv)
	put32(v.union(), 4, 2)
	put64(v.union(), 8, 7)
	put64(v.union(), 16, 8)
	if got, want := v.InternalError().String(), "an exit while an event was delivered, data [0x7 0x8]"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestOtherExits(t *testing.T) {
	v := fakeExit(mempage.Size, func(u []byte) {
		put64(u, 0, 0x80000021)
		put32(u, 8, 1)
	})
	if got, want := v.FailEntry(), (FailEntryExit{Reason: 0x80000021, CPU: 1}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	v = fakeExit(mempage.Size, func(u []byte) {
		put32(u, 0, SystemEventReset)
		put32(u, 4, 1)
		put64(u, 8, 9)
	})
	if got, want := v.SystemEvent(), (SystemEventExit{Type: SystemEventReset, Data: []uint64{9}}); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	v.SetHypercallResult(0x1234)
	if got := binary.LittleEndian.Uint64(v.area[unsafe.Offsetof(gokvm.RunData{}.Data)+56:]); got != 0x1234 {
		t.Errorf("result %#x", got)
	}
	for reason, want := range map[ExitReason]string{ExitIO: "KVM_EXIT_IO", exitMemoryFault: "KVM_EXIT_MEMORY_FAULT", 99: "KVM_EXIT_99"} {
		if got := reason.String(); got != want {
			t.Errorf("%d is %q, want %q", uint32(reason), got, want)
		}
	}
}
