package vmm

import (
	"bytes"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/guest"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/vsock"
)

// DeviceInfo describes the virtio devices of a VM at one moment.
type DeviceInfo struct {
	Balloon *BalloonInfo // nil: none
	RNG     bool
	Console bool
	Disks   []DiskInfo
	Nets    []NetInfo
	Vsock   *vsock.Config // nil: none
}

// BalloonInfo describes a memory balloon. Target is what it shall hold of the
// guest's memory, in bytes, and Actual what the guest says it holds.
type BalloonInfo struct {
	Target uint64
	Actual uint64
	// Stats are the statistics that the guest gave last; nil: none yet.
	Stats *balloon.Stats
}

// DiskInfo describes a disk, and what was done with it in this process.
type DiskInfo struct {
	DiskSpec
	Stats blk.Stats
}

// NetInfo describes a network device, and what passed in this process.
type NetInfo struct {
	NetSpec
	// Tap is the host's interface, named by the host if it was not by the spec.
	Tap      string
	Counters net.Counters
}

// deviceInfo does not wait for the guest: the balloon's statistics are those
// that came last.
func (m *Machine) deviceInfo() *DeviceInfo {
	d := &m.spec.Devices
	i := &DeviceInfo{RNG: d.RNG, Console: d.Console, Balloon: m.balloonInfo(), Vsock: d.Vsock}
	for n, disk := range m.shown.disks {
		i.Disks = append(i.Disks, DiskInfo{d.Disks[n], disk.Stats()})
	}
	for n, dev := range m.shown.nets {
		i.Nets = append(i.Nets, NetInfo{d.Nets[n], m.shown.taps[n], dev.Counters()})
	}
	return i
}

func (m *Machine) balloonInfo() *BalloonInfo {
	if m.balloon == nil {
		return nil
	}
	i := &BalloonInfo{Target: m.balloon.Target(), Actual: m.balloon.Actual()}
	if s, ok := m.balloon.Stats(); ok {
		i.Stats = &s
	}
	return i
}

// kernelKind names the kind of file that the kernel is.
func (s *Spec) kernelKind() string {
	switch {
	case bytes.Equal(s.Kernel, guest.ELF):
		return "demo guest"
	case bytes.HasPrefix(s.Kernel, []byte("\x7fELF")):
		return "ELF"
	}
	return "bzImage"
}
