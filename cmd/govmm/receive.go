package main

import (
	"fmt"
	"net"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/govmm/govmm/vmm"
)

// receiveFlags are the flags of govmm receive.
type receiveFlags struct {
	hostFlags
	overrideFlags
	listen string
}

func newReceive() *cobra.Command {
	var f receiveFlags
	cmd := &cobra.Command{
		Use:   "receive [NAME] --listen HOST:PORT",
		Short: "Wait for a guest that is migrated here, and then run it",
		Long: `Wait for a guest that is migrated here, and then run it as govmm run does.

The guest's CPUs, memory and devices are those it had: nothing has to be said
about them here, but where its disks, taps and socket are if that is not where they were.
A disk has to be the same one, on storage that both hosts reach. Port 0 takes any free port; the address that it prints is the one
for govmm migrate --to. An attempt that fails leaves it waiting for the next.

Whoever can connect can hand it a guest: listen on an address that only your
own hosts reach.`,
		Args: oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return usagef(cmd, "%v", err)
			}
			here, err := f.devices()
			if err != nil {
				return usagef(cmd, "%v", err)
			}
			return f.host(cmd, args, func(h host) (*vmm.VM, error) {
				return vmm.NewReceiver(vmm.ReceiveConfig{Name: h.name, Listen: f.listen, Serial: h.serial, Console: h.console,
					Disks: here.disks, Nets: here.nets, Vsock: here.vsock, Tracking: vmm.DirtyTracking(f.tracking), Logf: h.logf})
			})
		},
	}
	f.hostFlags.register(cmd)
	f.overrideFlags.register(cmd)
	cmd.Flags().StringVar(&f.listen, "listen", "", "`HOST:PORT` to wait at; no HOST: every address of this host")
	return cmd
}

// check reports the first flag that makes no sense.
func (f *receiveFlags) check() error {
	if f.listen == "" {
		return fmt.Errorf("--listen HOST:PORT is missing; 127.0.0.1:0 takes any free port of this host")
	}
	_, port, err := net.SplitHostPort(f.listen)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return fmt.Errorf("--listen %.80q: HOST:PORT is wanted, with a port of 0 to 65535", f.listen)
	}
	return f.hostFlags.check()
}
