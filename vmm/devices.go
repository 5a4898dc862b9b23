package vmm

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/vsock"
)

// Devices are the virtio devices of a machine: plain data, a part of [Spec].
// They are on the PCI bus in the order of the fields, from slot 1 on.
type Devices struct {
	// Balloon is the memory balloon, with statistics, free-page reporting and
	// free-page hints.
	Balloon bool `cbor:"balloon"`
	// RNG is the entropy device.
	RNG bool `cbor:"rng"`
	// Console is a virtio console, hvc0 in Linux.
	Console bool `cbor:"console"`
	// Disks are vda, vdb and so on in Linux.
	Disks []DiskSpec `cbor:"disks"`
	// Nets are eth0, eth1 and so on.
	Nets []NetSpec `cbor:"nets"`
	// Vsock is the socket device; nil: there is none.
	Vsock *vsock.Config `cbor:"vsock"`
}

// DiskSpec is a disk and what the guest has been told of it.
type DiskSpec struct {
	blk.Config
	// Size in bytes; 0: it has not been opened yet.
	Size uint64
}

// NetSpec is a network device and what the guest has been told of it.
type NetSpec struct {
	net.Options
	// Features are those that the guest was offered; 0: it has not been opened
	// yet.
	Features uint64
}

// count is the number of PCI slots that the devices take.
func (d *Devices) count() int {
	n := len(d.Disks) + len(d.Nets)
	for _, on := range []bool{d.Balloon, d.RNG, d.Console, d.Vsock != nil} {
		if on {
			n++
		}
	}
	return n
}

// maxDevices is how many devices there is room for beside the host bridge.
const maxDevices = pci.Slots - 1

// validate lists what no host could make devices from.
func (d *Devices) validate() (errs []error) {
	if n := d.count(); n > maxDevices {
		errs = append(errs, fmt.Errorf("%d devices: the bus has room for %d", n, maxDevices))
	}
	paths := map[string]bool{}
	for _, disk := range d.Disks {
		if err := disk.Validate(); err != nil {
			errs = append(errs, fmt.Errorf("disk %s: %w", disk.Path, err))
		}
		if paths[disk.Path] {
			errs = append(errs, fmt.Errorf("disk %s: it is there twice", disk.Path))
		}
		paths[disk.Path] = true
	}
	taps := map[string]bool{}
	for _, n := range d.Nets {
		if err := n.Validate(); err != nil {
			errs = append(errs, fmt.Errorf("network device %s: %w", n.MAC, err))
		}
		if n.Tap != "" && taps[n.Tap] {
			errs = append(errs, fmt.Errorf("tap %s: it is there twice", n.Tap))
		}
		taps[n.Tap] = true
	}
	if d.Vsock != nil {
		if err := d.Vsock.Validate(); err != nil {
			errs = append(errs, fmt.Errorf("vsock %s: %w", d.Vsock.Path, err))
		}
	}
	return errs
}

// overrideDisks puts disks of this host in the place of the source's, in their
// order: the path and the way to it. What the guest knows of them stays.
func (d *Devices) overrideDisks(here []blk.Config) error {
	if here == nil {
		return nil
	}
	if len(here) != len(d.Disks) {
		return fmt.Errorf("the guest has %d disks, %d are given here", len(d.Disks), len(here))
	}
	var errs []error
	for i := range d.Disks {
		disk, o := &d.Disks[i], here[i]
		for _, differs := range []struct {
			what string
			is   bool
		}{
			{"readonly", o.ReadOnly && !disk.ReadOnly},
			{"id", o.ID != "" && o.ID != disk.ID},
			{"queues", o.Queues != 0 && o.Queues != max(disk.Queues, 1)},
		} {
			if differs.is {
				errs = append(errs, fmt.Errorf("disk %s: %s is the guest's and cannot change when it moves (disk %d is %s)",
					o.Path, differs.what, i, disk.Config))
			}
		}
		disk.Path, disk.Direct = o.Path, o.Direct
	}
	return errors.Join(errs...)
}

// overrideNets puts taps of this host in the place of the source's, in their
// order.
func (d *Devices) overrideNets(here []net.Options) error {
	for i := range d.Nets {
		d.Nets[i].Owner = nil // a user of the source's host
	}
	if here == nil {
		return nil
	}
	if len(here) != len(d.Nets) {
		return fmt.Errorf("the guest has %d network devices, %d are given here", len(d.Nets), len(here))
	}
	for i := range d.Nets {
		d.Nets[i].Tap, d.Nets[i].Bridge, d.Nets[i].Owner = here[i].Tap, here[i].Bridge, here[i].Owner
	}
	return nil
}

// overrideVsock puts a socket of this host in the place of the source's.
func (d *Devices) overrideVsock(here *vsock.Config) error {
	switch {
	case here == nil:
		return nil
	case d.Vsock == nil:
		return fmt.Errorf("vsock %s: the guest has no socket device", here.Path)
	case here.CID != 0 && here.GuestCID() != d.Vsock.GuestCID():
		return fmt.Errorf("vsock %s: the CID is the guest's and cannot change when it moves; it is %d", here.Path, d.Vsock.GuestCID())
	}
	d.Vsock = &vsock.Config{CID: d.Vsock.CID, Path: here.Path}
	return nil
}

// backends are the devices that hold something of the host: images, taps and
// sockets. They outlive a machine that is reset.
type backends struct {
	disks []*blk.Device
	nets  []*net.Device
	vsock *vsock.Device // nil: none
	taps  []string      // the host's names of the nets
}

// openBackends opens what the devices need of this host, and notes in d what
// the guest will be told. The error lists everything that cannot be had, or is
// not what the guest knows. Disks are not locked yet.
func openBackends(d *Devices, logf func(string, ...any)) (_ *backends, err error) {
	b := &backends{}
	var errs []error
	for i := range d.Disks {
		if err := b.openDisk(&d.Disks[i], logf); err != nil {
			errs = append(errs, err)
		}
	}
	for i := range d.Nets {
		if err := b.openNet(&d.Nets[i], logf); err != nil {
			errs = append(errs, err)
		}
	}
	if d.Vsock != nil {
		var err error
		if b.vsock, err = vsock.New(*d.Vsock, slog.New(lineHandler{logf: logf})); err != nil {
			errs = append(errs, err)
		}
	}
	if errs != nil {
		return nil, errors.Join(append(errs, b.close())...)
	}
	return b, nil
}

func (b *backends) openDisk(s *DiskSpec, logf func(string, ...any)) error {
	c := s.Config
	// What a guest has written says nothing about the image's format.
	c.Raw = c.Raw || s.Size != 0
	disk, err := blk.Open(c, slog.New(lineHandler{logf: logf}))
	if err != nil {
		return err
	}
	b.disks = append(b.disks, disk)
	if s.Size != 0 && disk.Size() != s.Size {
		return fmt.Errorf("disk %s: it has %d bytes, the guest's has %d", s.Path, disk.Size(), s.Size)
	}
	s.Size = disk.Size()
	return nil
}

func (b *backends) openNet(s *NetSpec, logf func(string, ...any)) error {
	tap, err := net.OpenTap(s.Options)
	if err != nil {
		return err
	}
	dev, err := net.New(net.Config{Backend: tap, MAC: s.MAC, MTU: s.MTU, Log: slog.New(lineHandler{logf: logf})})
	if err != nil {
		return errors.Join(err, tap.Close())
	}
	b.nets, b.taps = append(b.nets, dev), append(b.taps, tap.Interface())
	if missing := s.Features &^ dev.Features(); missing != 0 {
		return fmt.Errorf("%s: this host's kernel lacks offloads that the guest was offered (features %#x)", tap.Name(), missing)
	}
	if s.Features == 0 {
		s.Features = dev.Features()
	}
	return nil
}

// acquire takes the right to use the disks and the socket: all of them, or
// none. It may be called when they are held.
func (b *backends) acquire() error {
	var errs []error
	for _, d := range b.disks {
		if err := d.Lock(); err != nil {
			errs = append(errs, err)
		}
	}
	if b.vsock != nil {
		if err := b.vsock.Listen(); err != nil {
			errs = append(errs, err)
		}
	}
	if errs != nil {
		return errors.Join(append(errs, b.release())...)
	}
	return nil
}

// release makes all writes durable and gives the right up. The devices are
// quiet. After an error some disks may still be held.
func (b *backends) release() error {
	var errs []error
	if b.vsock != nil {
		errs = append(errs, b.vsock.Unlisten())
	}
	for _, d := range b.disks {
		errs = append(errs, d.Unlock())
	}
	return errors.Join(errs...)
}

// sync makes what was written so far durable, so that little is left to do when
// the guest stands still.
func (b *backends) sync() {
	for _, d := range b.disks {
		_ = d.Sync() // Unlock says so
	}
}

// announce tells the network where the guest is now.
func (b *backends) announce() {
	for _, n := range b.nets {
		n.Announce()
	}
}

func (b *backends) close() error {
	if b == nil {
		return nil
	}
	var errs []error
	for _, d := range b.disks {
		errs = append(errs, d.Close())
	}
	for _, n := range b.nets {
		errs = append(errs, n.Close())
	}
	if b.vsock != nil {
		errs = append(errs, b.vsock.Close())
	}
	b.disks, b.nets, b.vsock, b.taps = nil, nil, nil, nil
	return errors.Join(errs...)
}

// lent is a backend behind a transport that does not own it.
type lent struct{ virtio.Device }

// Close does nothing: backends.close does.
func (lent) Close() error { return nil }

// String lists the devices in one line, in the order of their slots.
func (d *Devices) String() string {
	var names []string
	for _, c := range []struct {
		on   bool
		name string
	}{{d.Balloon, "balloon"}, {d.RNG, "rng"}, {d.Console, "console"}} {
		if c.on {
			names = append(names, c.name)
		}
	}
	for _, disk := range d.Disks {
		names = append(names, "disk "+disk.Path)
	}
	for _, n := range d.Nets {
		names = append(names, "net "+n.MAC.String())
	}
	if d.Vsock != nil {
		names = append(names, fmt.Sprintf("vsock cid %d", d.Vsock.GuestCID()))
	}
	return strings.Join(names, ", ")
}
