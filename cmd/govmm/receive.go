package main

import (
	"errors"
	"fmt"
	"net"
	"strconv"

	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/govmm/govmm/vmm/memory"
	"github.com/govmm/govmm/vmm/sandbox"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// receiveFlags are the flags of govmm receive.
type receiveFlags struct {
	hostFlags
	deviceFlags
	listen     string
	backing    string
	trustPaths bool
}

func newReceive() *cobra.Command {
	var f receiveFlags
	cmd := &cobra.Command{
		Use:   "receive [NAME] --listen HOST:PORT",
		Short: "Wait for a guest that is migrated here, and then run it",
		Long: `Wait for a guest that is migrated here, and then run it as govmm run does.

The guest keeps its CPUs, memory and devices. What its devices use of this host
(disks, taps, a socket) is only what flags give here, one for each device in
their order; a guest that needs more is refused, with the flags that it needs. With
--allow-source-paths it gets whatever the source names, as root perhaps any file
of this host: for hosts that trust each other. A disk must be the same one, on
storage that both hosts reach. Port 0 takes any free port; the address that is
printed is the one for govmm migrate --to. After an attempt that fails it waits
for the next.

Anybody who can connect can send a guest: listen on an address that only your
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
				ln, err := net.Listen("tcp", f.listen)
				if err != nil {
					return nil, err
				}
				vm, err := vmm.NewReceiver(vmm.ReceiveConfig{Name: h.name, Listener: ln, Serial: h.serial, Console: h.console,
					Devices: here, AllowSourcePaths: f.trustPaths, Backing: memory.Backing(f.backing), Tracking: machine.DirtyTracking(f.tracking), Overcommit: f.overcommit, Log: h.log})
				if err != nil {
					return nil, errors.Join(err, ln.Close())
				}
				return vm, nil
			}, func() sandbox.Policy {
				policy := laterOf(here, true)
				if f.trustPaths { // whatever the source names is opened when it comes
					policy.AllFiles, policy.Listen, policy.Netlink, policy.Keep = true, true, true, []int{unix.CAP_NET_ADMIN}
				}
				return policy
			})
		},
	}
	f.hostFlags.register(cmd)
	f.registerReceive(cmd.Flags())
	cmd.Flags().BoolVar(&f.trustPaths, "allow-source-paths", false, "let a source name the disks, taps, bridges and sockets of this host, and take its huge pages: where no flag gives others, the same names as at the source")
	cmd.Flags().StringVar(&f.backing, "memory-backing", "", "`KIND` of host memory: anonymous, memfd or hugetlb; none: as at the source, unless that is hugetlb")
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
		return fmt.Errorf("--listen %.80q: expected HOST:PORT, with a port between 0 and 65535", f.listen)
	}
	if _, err := memory.ParseBacking(f.backing); f.backing != "" && err != nil {
		return fmt.Errorf("--memory-backing: %w", err)
	}
	return f.hostFlags.check()
}
