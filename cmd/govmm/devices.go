package main

import (
	"github.com/spf13/cobra"

	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/vsock"
	"github.com/govmm/govmm/vmm"
)

// deviceFlags are the virtio devices of govmm run.
type deviceFlags struct {
	disks   []string
	nets    []string
	vsock   string
	balloon bool
	rng     bool
}

func (f *deviceFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringArrayVar(&f.disks, "disk", nil, "a disk: path=FILE[,readonly][,direct][,id=ID][,queues=N][,format=raw] (`DISK`; may be given several times)")
	flags.StringArrayVar(&f.nets, "net", nil, "a network device: tap[=NAME][,bridge=NAME][,mac=ADDRESS][,mtu=BYTES][,queues=N][,owner=USER] (`NET`; may be given several times)")
	flags.StringVar(&f.vsock, "vsock", "", "sockets between host and guest: path=SOCKET[,cid=N] (`VSOCK`)")
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
	var err error
	d.Vsock, err = parseVsock(f.vsock)
	return d, err
}

// parseVsock reads the value of --vsock; "" is none.
func parseVsock(s string) (*vsock.Config, error) {
	if s == "" {
		return nil, nil
	}
	c, err := vsock.ParseConfig(s)
	if err != nil {
		return nil, err
	}
	return &c, nil
}

// overrideFlags are the disks, taps and the socket of govmm receive, in the
// place of those that the guest had.
type overrideFlags struct {
	disks []string
	nets  []string
	vsock string
}

// overrides are what they say.
type overrides struct {
	disks []blk.Config
	nets  []net.Options
	vsock *vsock.Config
}

func (f *overrideFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringArrayVar(&f.disks, "disk", nil, "where the guest's disk is here: path=FILE[,direct] (`DISK`; once for each disk, in their order; none: the same paths as there)")
	flags.StringArrayVar(&f.nets, "net", nil, "the guest's tap here: tap[=NAME][,bridge=NAME][,owner=USER] (`NET`; once for each, in their order; none: the same names as there)")
	flags.StringVar(&f.vsock, "vsock", "", "where the guest's socket device has its socket here: path=SOCKET (`VSOCK`; none: the same path as there)")
}

func (f *overrideFlags) devices() (o overrides, err error) {
	for _, s := range f.disks {
		c, err := blk.ParseConfig(s)
		if err != nil {
			return o, err
		}
		o.disks = append(o.disks, c)
	}
	for _, s := range f.nets {
		n, err := net.ParseHostOptions(s)
		if err != nil {
			return o, err
		}
		o.nets = append(o.nets, n)
	}
	o.vsock, err = parseVsock(f.vsock)
	return o, err
}
