package vmm

import (
	"log/slog"

	"github.com/govmm/govmm/guest"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/console"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/govmm/govmm/vmm/memory"
	"github.com/govmm/govmm/vmm/serial"
)

// Config says what machine a [VM] is. The zero value is a machine that runs the
// demo guest.
type Config struct {
	Name    string         // "": vm
	CPUs    int            // 0: 1
	CPU     string         // the processor, one of cpu.Models; "": cpu.Host
	Memory  uint64         // bytes; 0: 256 MiB
	Backing memory.Backing // "": memory.DefaultBacking
	// Overcommit allows more memory than is available on this host, see memory.Admit.
	Overcommit bool
	// Tracking is how the guest's writes are tracked when it is migrated;
	// "": machine.TrackAuto.
	Tracking machine.DirtyTracking
	// Kernel is an ELF file with a PVH entry, or a bzImage. nil: the demo guest
	// of package guest, with its default command line if Cmdline is empty.
	Kernel []byte
	// Cmdline is the kernel's command line. "": console=ttyS0, and, if there is
	// a disk and no Initrd, the first disk as the root.
	Cmdline string
	// Initrd is the initial RAM disk; nil: none.
	Initrd []byte
	// DiskBoot takes kernel, initial RAM disk and, if Cmdline is empty, the command line out
	// of the first disk, at the start and at each reset; Kernel and Initrd are nil. BootEntry
	// is the id or title of what boots; "": what the disk's boot loader would choose.
	// DiskReader reads it; whoever made it closes it when Run has returned.
	DiskBoot   bool
	BootEntry  string
	DiskReader machine.KernelReader
	// NoUnpack lets a bzImage unpack itself in the guest.
	NoUnpack bool
	// Devices are the virtio devices, such as &blk.Spec{...} and &balloon.Spec{}.
	// NewVM notes in them what the guest is told.
	Devices []virtio.Spec
	// Kinds are kinds of devices beside the built-in ones of machine.Kinds.
	Kinds []virtio.Kind
	// Force starts the guest from images that are marked as old copies: their guest has moved away.
	Force bool
	// Serial is the other end of the guest's serial port; nil: nothing. It
	// stays open when the guest resets itself; [VM.Run] closes it at its end.
	Serial serial.Backend
	// Console is the other end of the virtio console, as Serial; nil: there is
	// no such device, unless Devices has it.
	Console serial.Backend
	// Log gets what a user should know; nil: nothing is logged. Of a kind of records (a
	// message and its attribute "device") it gets the first one and then one in ten seconds,
	// which has as "more" how many it stands for. Nobody waits for its handler, which
	// is called by one goroutine at a time.
	Log *slog.Logger
}

const defaultMemory = 256 << 20

// withDefaults replaces zero values by what they stand for.
func (c Config) withDefaults() Config {
	if c.Name == "" {
		c.Name = "vm"
	}
	if c.CPUs == 0 {
		c.CPUs = 1
	}
	if c.Memory == 0 {
		c.Memory = defaultMemory
	}
	if c.Backing == "" {
		c.Backing = memory.DefaultBacking
	}
	if c.DiskBoot {
		return c.withConsole()
	}
	if c.Kernel == nil {
		c.Kernel = guest.ELF
		if c.Cmdline == "" {
			c.Cmdline = guest.DefaultCmdline
		}
	}
	if c.Cmdline == "" {
		c.Cmdline = c.linuxCmdline()
	}
	return c.withConsole()
}

// withConsole adds the device that Console needs.
func (c Config) withConsole() Config {
	if c.Console != nil && specOf[*console.Spec](c.Devices) == nil {
		c.Devices = append(c.Devices[:len(c.Devices):len(c.Devices)], &console.Spec{})
	}
	return c
}

// specOf returns the first of the devices that is a T, or the zero T.
func specOf[T virtio.Spec](devices []virtio.Spec) (none T) {
	for _, d := range devices {
		if t, ok := d.(T); ok {
			return t
		}
	}
	return none
}

// linuxCmdline lets a Linux kernel print what it does, and find its root.
func (c *Config) linuxCmdline() string {
	const console = "console=ttyS0"
	root := specOf[*blk.Spec](c.Devices)
	switch {
	case len(c.Initrd) > 0 || root == nil:
		return console
	case root.ReadOnly:
		return console + " root=/dev/vda ro"
	}
	return console + " root=/dev/vda rw"
}

// spec describes the machine, on this host.
func (c Config) spec() (machine.Spec, error) {
	c = c.withDefaults()
	for _, d := range c.Devices {
		if disk, ok := d.(*blk.Spec); ok && c.Force {
			disk.Force = true
		}
	}
	var boot *machine.DiskBoot
	if c.DiskBoot {
		boot = &machine.DiskBoot{Entry: c.BootEntry}
	}
	return machine.Spec{
		Boot: boot, Reader: c.DiskReader,
		Name: c.Name, CPUs: c.CPUs, Memory: c.Memory, Backing: c.Backing,
		Cmdline: c.Cmdline, Kernel: c.Kernel, Initrd: c.Initrd, NoUnpack: c.NoUnpack,
		Devices: c.Devices, Kinds: c.Kinds, Tracking: c.Tracking, Overcommit: c.Overcommit,
	}.Complete(c.CPU)
}
