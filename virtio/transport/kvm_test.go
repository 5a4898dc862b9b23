package transport_test

import (
	"errors"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/virtio/transport"
	"github.com/govmm/govmm/virtio/virtiotest"
	"github.com/govmm/govmm/vmm/memory"
	"golang.org/x/sys/unix"
)

// kvmHost is a KVM VM as transports want it.
type kvmHost struct{ vm *kvm.VM }

func (h kvmHost) SignalMSI(address uint64, data uint32) error {
	delivered, err := h.vm.SignalMSI(address, data)
	if err == nil && !delivered {
		err = errors.New("the local APIC does not take the message")
	}
	return err
}

func (h kvmHost) AssignIOEventFD(gpa uint64, fd int) error {
	return h.vm.IOEventFD(kvm.IOEventFD{Addr: gpa, FD: fd})
}
func (h kvmHost) DeassignIOEventFD(gpa uint64, fd int) error {
	return h.vm.IOEventFD(kvm.IOEventFD{Addr: gpa, FD: fd, Flags: kvm.IOEventFDDeassign})
}

// openKVM opens /dev/kvm, or skips the test.
func openKVM(t *testing.T) *kvm.System {
	t.Helper()
	testenv.NeedKVM(t)
	s, err := kvm.Open()
	check(t, err)
	t.Cleanup(func() { check(t, s.Close()) })
	return s
}

// On KVM a guest's write to the notification address kicks the device without
// an exit, and the device's answer is an interrupt that waits in the local APIC
// of the vCPU.
func TestKVM(t *testing.T) {
	vm, err := openKVM(t).CreateVM()
	check(t, err)
	t.Cleanup(func() { check(t, vm.Close()) })
	check(t, vm.CreateIRQChip())
	mem, err := memory.New(2<<20, memory.Anonymous)
	check(t, err)
	t.Cleanup(func() { check(t, mem.Close()) })
	slot := mem.Slots()[0]
	check(t, vm.SetUserMemoryRegion(kvm.MemorySlot{Size: slot.Size, HVA: slot.HVA}))

	host := kvmHost{vm}
	g := &guest{t: t, bus: pci.NewBus(), echo: &virtiotest.Echo{Queues: []uint16{queueSize, queueSize}}}
	logs := make(chan string, 1)
	g.device, err = transport.New(g.echo, transport.Host{Memory: mem, Interrupts: host, Notifications: host, Log: virtiotest.Log(t, logs)})
	check(t, err)
	t.Cleanup(func() { check(t, g.device.Close()) })
	_, err = g.bus.Add(1, g.device.Function())
	check(t, err)

	// Up to DRIVER_OK from here, in the place of the guest.
	if !g.negotiate(allFeatures) {
		t.Fatalf("status %#x", g.status())
	}
	g.interrupts()
	d := virtiotest.NewDriver(t, mem, ramBase, queueSize, allFeatures)
	g.setQueue(0, d.State())
	g.write(common+20, 1, 15)
	buf := ramBase + virtiotest.RingBytes(queueSize)
	check(t, mem.WriteAt([]byte("over KVM"), buf))
	d.Add([]virtiotest.Buffer{{GPA: buf, Len: 8}}, []virtiotest.Buffer{{GPA: buf + 0x1000, Len: 8}})

	v, err := vm.CreateVCPU(0)
	check(t, err)
	t.Cleanup(func() { check(t, v.Close()) })
	check(t, mem.WriteAt([]byte{
		0xa3, 0x00, 0x30, // mov %ax, 0x3000: the notification address of queue 0
		0xa3, 0x00, 0x20, // mov %ax, 0x2000: the device configuration, which exits
	}, 0x1000))
	s, err := v.GetSregs()
	check(t, err)
	s.CS.Base, s.CS.Selector, s.DS.Base = 0, 0, common
	check(t, v.SetSregs(s))
	check(t, v.SetRegs(kvm.Regs{RIP: 0x1000, RFLAGS: 2}))
	lapic, err := v.GetLAPIC()
	check(t, err)
	lapic.Regs[0xf1] |= 1 // spurious vector register: enabled
	check(t, v.SetLAPIC(lapic))

	for err = v.Run(); errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN); err = v.Run() {
	}
	check(t, err)
	if v.ExitReason() != kvm.ExitMMIO || v.MMIO().Addr != device {
		t.Fatalf("exit %v, MMIO %+v; want the write to the device configuration", v.ExitReason(), v.MMIO())
	}
	requested := func(vector int) bool {
		l, err := v.GetLAPIC()
		check(t, err)
		return l.Regs[0x200+vector/32*16+vector%32/8]>>(vector%8)&1 != 0
	}
	arrives := func(vector int) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); !requested(vector); {
			if time.Now().After(deadline) {
				t.Fatalf("no interrupt %#x in the local APIC", vector)
			}
		}
	}
	arrives(0x41)
	u, ok := d.Used()
	if got := string(d.Bytes(buf+0x1000, 8)); !ok || u.Len != 8 || got != "over KVM" {
		t.Errorf("answer %q, %+v, %v", got, u, ok)
	}
	marked := make([]uint64, slot.Size/4096/64)
	check(t, mem.FetchDirty(0, func(w int, word uint64) { marked[w] = word }))
	if page := (buf + 0x1000) / 4096; marked[page/64]>>(page%64)&1 == 0 {
		t.Error("the answer is not marked dirty")
	}

	// What is raised before Pause returns is in the local APIC; what is raised
	// after it waits for Resume.
	g.echo.Set(1)
	s1 := g.save()
	if !requested(0x40) {
		t.Error("an interrupt raised before Pause is not in the local APIC")
	}
	if len(s1.Function.Table) != 3*16 || s1.Function.Pending[0] != 0 {
		t.Errorf("state %+v", s1.Function)
	}
	check(t, v.SetLAPIC(lapic))
	g.echo.Set(2)
	if requested(0x40) {
		t.Error("an interrupt while the device is paused")
	}
	check(t, g.device.Resume())
	arrives(0x40)
	arrives(0x41)
	g.write(common+20, 1, 0)
	if len(logs) > 0 {
		t.Error(<-logs)
	}
}
