package net

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ipv6Settings is where the kernel has an interface's settings of IPv6 (the kernel's
// Documentation/networking/ip-sysctl.rst).
const ipv6Settings = "/proc/sys/net/ipv6/conf"

// addrGenNone is IN6_ADDR_GEN_MODE_NONE (linux/if_link.h): no link-local address.
const addrGenNone = 1

// silence keeps the host's IPv6 off an interface that was made, before it is up: the host gets no
// address by it and takes nothing from it. Without that the guest is a neighbour of the
// host, and a router advertisement of the guest gives the host addresses and routes.
// A user who turns IPv6 on again (disable_ipv6) does not get what the guest advertises.
// Frames that a bridge forwards are not concerned.
func silence(links *netlink.Handle, link netlink.Link) error {
	err := links.LinkSetIP6AddrGenMode(link, addrGenNone)
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil // a kernel without IPv6
	} else if err != nil {
		return fmt.Errorf("set that it has no IPv6 address: %w", err)
	}
	for _, s := range []struct{ name, value string }{{"disable_ipv6", "1"}, {"accept_ra", "0"}, {"autoconf", "0"}} {
		if err := setSetting(filepath.Join(ipv6Settings, link.Attrs().Name, s.name), s.value); err != nil {
			return fmt.Errorf("keep the host's IPv6 off it: %w (or use a tap that was made before)", err)
		}
	}
	return nil
}

// setSetting writes a setting of the kernel that differs: in a container they may be
// read-only.
func setSetting(path, value string) error {
	if have, err := os.ReadFile(path); err == nil && string(have) == value+"\n" {
		return nil
	}
	return os.WriteFile(path, []byte(value), 0)
}
