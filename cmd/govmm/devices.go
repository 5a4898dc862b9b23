package main

import (
	"github.com/spf13/cobra"

	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/vmm"
)

// deviceFlags are the virtio devices of govmm run.
type deviceFlags struct {
	disks   []string
	nets    []string
	balloon bool
	rng     bool
}

func (f *deviceFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringArrayVar(&f.disks, "disk", nil, "a disk: path=FILE[,readonly][,direct][,id=ID][,queues=N][,format=raw] (`DISK`; may be given several times)")
	flags.StringArrayVar(&f.nets, "net", nil, "a network device: tap[=NAME][,bridge=NAME][,mac=ADDRESS][,mtu=BYTES][,queues=N][,owner=USER] (`NET`; may be given several times)")
	flags.BoolVar(&f.balloon, "balloon", true, "a memory balloon, with which the guest says what it does not use")
	flags.BoolVar(&f.rng, "rng", true, "an entropy device")
}

// devices turns the flags into devices.
func (f *deviceFlags) devices() (vmm.Devices, error) {
	d := vmm.Devices{Balloon: f.balloon, RNG: f.rng}
	for _, s := range f.disks {
		c, err := blk.ParseConfig(s)
		if err != nil {
			return d, err
		}
		d.Disks = append(d.Disks, vmm.DiskSpec{Config: c})
	}
	for _, s := range f.nets {
		o, err := net.ParseOptions(s)
		if err != nil {
			return d, err
		}
		d.Nets = append(d.Nets, vmm.NetSpec{Options: o})
	}
	return d, nil
}

// overrideFlags are the disks and taps of govmm receive, in the place of those
// that the guest had.
type overrideFlags struct {
	disks []string
	nets  []string
}

func (f *overrideFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringArrayVar(&f.disks, "disk", nil, "where the guest's disk is here: path=FILE[,direct] (`DISK`; once for each disk, in their order; none: the same paths as there)")
	flags.StringArrayVar(&f.nets, "net", nil, "the guest's tap here: tap[=NAME][,bridge=NAME][,owner=USER] (`NET`; once for each, in their order; none: the same names as there)")
}

func (f *overrideFlags) devices() (disks []blk.Config, nets []net.Options, err error) {
	for _, s := range f.disks {
		c, err := blk.ParseConfig(s)
		if err != nil {
			return nil, nil, err
		}
		disks = append(disks, c)
	}
	for _, s := range f.nets {
		o, err := net.ParseHostOptions(s)
		if err != nil {
			return nil, nil, err
		}
		nets = append(nets, o)
	}
	return disks, nets, nil
}
