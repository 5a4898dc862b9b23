package main

import (
	"context"
	"errors"
	"strconv"

	"github.com/govmm/govmm/image"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/diskboot"
	"github.com/govmm/govmm/vmm/diskboot/find"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/spf13/pflag"
)

// readDisk is the argument of the process that reads what is on a guest's disk.
const readDisk = "__read-disk"

// serveDisk is that process.
func serveDisk() int {
	if find.Serve() != nil {
		return exitFailed
	}
	return exitDone
}

// startReader starts it. It waits, and ends with this process at the latest.
func startReader() (*diskboot.Reader, error) {
	return diskboot.Start([]string{"/proc/self/exe", readDisk})
}

// bootFlags are the flags of a VM that boots from its disk.
type bootFlags struct{ entry string }

func (f *bootFlags) register(flags *pflag.FlagSet) {
	flags.StringVar(&f.entry, "boot-entry", "", "the `NAME` of what boots from the disk, an id or a title of its boot loader's menu (without --kernel, and with a disk that has a system)")
}

// check reports a flag that makes no sense.
func (f *bootFlags) check(kernel string, devices []virtio.Spec) error {
	if f.entry != "" && (kernel != "" || firstDisk(devices) == nil) {
		return errors.New("--boot-entry needs --disk, and no --kernel")
	}
	return nil
}

// choose lets a VM without a kernel boot from its first disk, if that looks as if it had a
// system. It is called before the sandbox.
func (f *bootFlags) choose(cfg *vmm.Config) error {
	disk := firstDisk(cfg.Devices)
	if cfg.Kernel == nil && disk != nil {
		cfg.DiskBoot = looksBootable(disk) || f.entry != ""
	}
	if !cfg.DiskBoot {
		return nil
	}
	cfg.BootEntry = f.entry
	reader, err := startReader()
	if err == nil {
		cfg.DiskReader = reader
	}
	return err
}

func firstDisk(devices []virtio.Spec) *blk.Spec {
	for _, d := range devices {
		if disk, ok := d.(*blk.Spec); ok {
			return disk
		}
	}
	return nil
}

// looksBootable looks at a few marks. What cannot be a disk is left to who opens it.
func looksBootable(disk *blk.Spec) bool {
	format := disk.Format
	if format == "" {
		format = image.Raw
	}
	im, err := image.Open(disk.Path, format)
	if err != nil {
		return false
	}
	defer im.Close()
	return diskboot.Looks(im)
}

// bootable is what of an image boots, for govmm image info.
type bootable struct {
	Entries []diskboot.Entry `json:"boot,omitempty"` // the first one is what boots if nobody chooses
	Why     string           `json:"boot_error,omitempty"`
}

// entriesOf lists what of an image boots. Another process looks for it.
func entriesOf(ctx context.Context, im image.Reader) (b bootable) {
	if im == nil || !diskboot.Looks(im) {
		return b
	}
	reader, err := startReader()
	if err == nil {
		b.Entries, err = reader.List(ctx, im)
		err = errors.Join(err, reader.Close())
	}
	if err != nil {
		b.Why = err.Error()
	}
	return b
}

// lines describes it to people: ids and titles, and the command line of what boots.
func (b *bootable) lines() (lines []string) {
	for _, e := range b.Entries {
		line := strconv.Quote(e.ID)
		if e.Title != e.ID {
			line += ", " + e.Title
		}
		lines = append(lines, line+", "+e.Kernel)
	}
	if len(lines) > 0 {
		lines[0] += ", with " + b.Entries[0].Cmdline
	}
	if b.Why != "" {
		lines = append(lines, b.Why)
	}
	return lines
}

// mayBootDisk says whether a guest that comes may boot from a disk.
func (f *receiveFlags) mayBootDisk(here []virtio.Spec) bool {
	return firstDisk(here) != nil || f.trustPaths || f.diskDir != ""
}

// readerFor starts the process that reads disks for a guest that comes, if it may boot from one: later
// no process is started. nil: there is none.
func readerFor(mayBoot bool) (machine.KernelReader, error) {
	if !mayBoot {
		return nil, nil
	}
	reader, err := startReader()
	if err != nil {
		return nil, err
	}
	return reader, nil
}
