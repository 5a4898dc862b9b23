package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm/sandbox"
	"github.com/govmm/govmm/vmm/serial"
	"golang.org/x/sys/unix"
)

// lookups are what a name is looked up in, for an outgoing migration.
var lookups = []string{"/etc/hosts", "/etc/nsswitch.conf", "/etc/resolv.conf", "/etc/services"}

// cage puts this process into the sandbox, which leaves it what policy has and what every
// VM needs.
func (p *process) cage(f *hostFlags, policy sandbox.Policy) error {
	policy.Mode = sandbox.Mode(f.sandbox)
	policy.Report = func(call string) { p.say("sandbox: not allowed, and let through: %s", call) }
	for _, port := range f.ports {
		policy.Ports = append(policy.Ports, uint16(port))
	}
	policy.Read = append(policy.Read, lookups...)
	if path, err := filepath.EvalSymlinks("/etc/resolv.conf"); err == nil && filepath.Dir(path) != "/etc" {
		policy.Read = append(policy.Read, filepath.Dir(path)) // where it is replaced
	}
	policy.Remove = append(policy.Remove, filepath.Dir(p.claim.Socket()))
	if p.state != "" {
		policy.Replace = append(policy.Replace, p.state)
	}
	for _, line := range []string{f.serial, f.console} {
		replace, remove := serial.Directories(line)
		policy.Replace, policy.Remove = append(policy.Replace, replace...), append(policy.Remove, remove...)
	}
	s, err := policy.Enter()
	if s.Missing != nil {
		p.say("the sandbox lacks what this host does not give: %s", strings.Join(s.Missing, "; "))
	}
	if errors.Is(err, sandbox.ErrNotGiven) {
		err = fmt.Errorf("%w; --sandbox auto goes on without", err)
	}
	return err
}

// laterOf is what devices need later.
func laterOf(devices []virtio.Spec, arrives bool) (policy sandbox.Policy) {
	for _, d := range devices {
		c, ok := d.(virtio.Latecomer)
		if !ok {
			continue
		}
		l := c.Later(arrives)
		policy.Read, policy.Write = append(policy.Read, l.Read...), append(policy.Write, l.Write...)
		policy.Replace = append(policy.Replace, l.Replace...)
		policy.Listen, policy.Netlink = policy.Listen || l.Listen, policy.Netlink || l.Netlink
		if l.NetAdmin {
			policy.Keep = []int{unix.CAP_NET_ADMIN}
		}
	}
	return policy
}
