package main

import (
	"context"

	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
)

func (c *controller) PowerOff() error                { return apiError(c.vm.PowerOff()) }
func (c *controller) Ended() <-chan struct{}         { return c.vm.Ended() }
func (c *controller) SetBalloon(target uint64) error { return apiError(c.vm.SetBalloon(target)) }

func (c *controller) Balloon(ctx context.Context) (api.Balloon, error) {
	b, err := c.vm.Balloon(ctx)
	if err != nil {
		return api.Balloon{}, apiError(err)
	}
	return api.Balloon(b), nil
}

// apiDevices are a VM's devices in the API's words.
func apiDevices(i *vmm.DeviceInfo) *api.Devices {
	if i == nil {
		return nil
	}
	d := &api.Devices{RNG: i.RNG, Console: i.Console, Disks: []api.Disk{}, Nets: []api.Net{}}
	if i.Balloon != nil {
		b := api.Balloon(*i.Balloon)
		d.Balloon = &b
	}
	if i.Vsock != nil {
		d.Vsock = &api.Vsock{CID: uint64(i.Vsock.GuestCID()), Path: i.Vsock.Path}
	}
	for _, k := range i.Disks {
		d.Disks = append(d.Disks, api.Disk{Path: k.Path, Size: k.Size, ReadOnly: k.ReadOnly, Direct: k.Direct, ID: k.ID, Queues: max(k.Queues, 1),
			ReadBytes: k.Stats.ReadBytes, WrittenBytes: k.Stats.WrittenBytes, Errors: k.Stats.Errors})
	}
	for _, n := range i.Nets {
		c := n.Counters
		d.Nets = append(d.Nets, api.Net{MAC: n.MAC.String(), Tap: n.Tap, Bridge: n.Bridge, MTU: n.MTU, Queues: n.Queues,
			RxFrames: c.RxFrames, RxBytes: c.RxBytes, RxDropped: c.RxDropped, TxFrames: c.TxFrames, TxBytes: c.TxBytes, TxDropped: c.TxDropped})
	}
	return d
}
