package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/govmm/govmm/internal/netproc"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/net/usernet"
	"github.com/govmm/govmm/vmm/sandbox"
	"golang.org/x/sys/unix"
)

// The first arguments of the processes of a user network, the one that starts others and
// the network itself, and of the one that keeps a macvtap. Their second one is their
// configuration.
const (
	userNetStarter = "__user-network"
	userNetProcess = "__user-network-process"
	macvtapKeeper  = "__macvtap"
)

// processes are what this program is beside its commands.
var processes = map[string]func(config string, stderr io.Writer) int{
	userNetStarter: func(config string, stderr io.Writer) int {
		return ends(stderr, netproc.Supervise([]string{"/proc/self/exe", userNetProcess, config}))
	},
	userNetProcess: func(config string, stderr io.Writer) int { return ends(stderr, runUserNet(config)) },
	macvtapKeeper:  func(config string, stderr io.Writer) int { return ends(stderr, keepMacvtap(config)) },
}

// ends is the exit status of such a process. The end of the VM's process is not an error.
func ends(stderr io.Writer, err error) int {
	if err == nil || errors.Is(err, netproc.ErrEnd) {
		return exitDone
	}
	_, _ = fmt.Fprintln(stderr, "govmm: network:", err)
	return exitFailed
}

// startNets says how the processes of networks are started.
func (f *hostFlags) startNets(id *identity) {
	net.MacvtapStart = net.MacvtapProcess{Command: []string{"/proc/self/exe", macvtapKeeper}, Sandbox: f.sandbox}
	net.UserNetStart = net.UserNetProcess{Command: []string{"/proc/self/exe", userNetStarter}, Sandbox: f.sandbox}
	if id != nil {
		net.UserNetStart.Become, net.UserNetStart.UID, net.UserNetStart.GID = true, uint32(id.uid), uint32(id.gid)
	}
}

// runUserNet is the process of a user network. It sees no file, and starts no process.
func runUserNet(config string) error {
	signal.Ignore(syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE) // it ends with the VM's process
	c, err := net.ParseUserNetConfig(config)
	if err != nil {
		return err
	}
	cfg := usernet.Config{UserNetConfig: c}
	if file, err := os.Open("/etc/resolv.conf"); err == nil {
		cfg.Servers = usernet.Servers(file)
		_ = file.Close()
	}
	policy := sandbox.Policy{Mode: sandbox.Mode(c.Sandbox), Network: true, Report: func(call string) { _, _ = fmt.Fprintln(os.Stderr, "sandbox: not allowed:", call) }}
	for _, f := range c.Forwards {
		if !f.UDP {
			policy.Bind = append(policy.Bind, f.Host.Port())
		}
		if f.Host.Port() < 1024 {
			policy.Keep = []int{unix.CAP_NET_BIND_SERVICE} // if it has it
		}
	}
	return usernet.Serve(cfg, func() error {
		_, err := policy.Enter()
		return err
	})
}

// keepMacvtap is the process that keeps a macvtap. It may change network interfaces, and do
// nothing else. It outlives the VM's for a moment, whoever ends that.
func keepMacvtap(config string) error {
	signal.Ignore(syscall.SIGINT, syscall.SIGHUP, syscall.SIGTERM, syscall.SIGPIPE)
	return net.KeepMacvtap(config, func(mode string) error {
		_, err := sandbox.Policy{Mode: sandbox.Mode(mode), Netlink: true, Keep: []int{unix.CAP_NET_ADMIN},
			Report: func(call string) { _, _ = fmt.Fprintln(os.Stderr, "sandbox: not allowed:", call) }}.Enter()
		debug.FreeOSMemory() // it waits now, perhaps for ever
		unmapProgram()
		return err
	})
}
