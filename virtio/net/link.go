package net

import (
	"errors"
	"fmt"
	"io/fs"
	stdnet "net"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// OpenTap attaches to the tap of the options, or makes it, and sets its MTU, its
// bridge and its state "up". A tap that is made disappears with the VMM, unless it
// has an owner. OpenTap changes only what differs, so that a tap that was prepared
// for this user needs no privilege.
func OpenTap(o Options) (*Tap, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	name, found := o.Tap, false
	if name == "" {
		name = "govmm%d"
	} else {
		link, err := netlink.LinkByName(name)
		var none netlink.LinkNotFoundError
		switch {
		case errors.As(err, &none):
		case err != nil:
			return nil, tapError(name, err)
		default:
			if tap, ok := link.(*netlink.Tuntap); !ok || tap.Mode != netlink.TUNTAP_MODE_TAP {
				return nil, fmt.Errorf("tap %s: the host's interface of that name is not a tap, but a %s", name, link.Type())
			}
			found = true
		}
	}
	t, err := openQueues(name, o.Queues)
	if err != nil {
		return nil, err
	}
	if err := t.configure(o, !found); err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return t, nil
}

// configure changes what differs from the options.
func (t *Tap) configure(o Options, made bool) error {
	if made && o.Owner != nil {
		if err := t.setOwner(int(*o.Owner)); err != nil {
			return tapError(t.name, err)
		}
	}
	link, err := netlink.LinkByName(t.name)
	if err != nil {
		return tapError(t.name, err)
	}
	have := link.Attrs()
	if o.MTU != 0 && have.MTU != int(o.MTU) {
		if err := netlink.LinkSetMTU(link, int(o.MTU)); err != nil {
			return tapError(t.name, fmt.Errorf("set its MTU to %d: %w", o.MTU, err))
		}
		have.MTU = int(o.MTU)
	}
	t.mtu = uint16(min(have.MTU, 65535))
	if made {
		// The host's end needs an address other than the guest's. A bridge
		// takes the smallest address of its ports, so this one begins high.
		mac := o.MAC
		mac[0] = 0xfe
		if err := netlink.LinkSetHardwareAddr(link, stdnet.HardwareAddr(mac[:])); err != nil {
			return tapError(t.name, fmt.Errorf("set its address to %s: %w", mac, err))
		}
	}
	if o.Bridge != "" {
		bridge, err := netlink.LinkByName(o.Bridge)
		var none netlink.LinkNotFoundError
		switch {
		case errors.As(err, &none):
			return fmt.Errorf("tap %s: bridge %s does not exist (make it: ip link add %s type bridge; ip link set %s up)", t.name, o.Bridge, o.Bridge, o.Bridge)
		case err != nil:
			return tapError(t.name, err)
		case bridge.Type() != "bridge":
			return fmt.Errorf("tap %s: %s is not a bridge, but a %s", t.name, o.Bridge, bridge.Type())
		}
		if have.MasterIndex != bridge.Attrs().Index {
			if err := netlink.LinkSetMaster(link, bridge); err != nil {
				return tapError(t.name, fmt.Errorf("add it to bridge %s: %w", o.Bridge, err))
			}
		}
	}
	if have.Flags&stdnet.FlagUp == 0 {
		if err := netlink.LinkSetUp(link); err != nil {
			return tapError(t.name, fmt.Errorf("set it up: %w", err))
		}
	}
	return nil
}

// setOwner gives a tap that was made to a user, and makes it stay.
func (t *Tap) setOwner(uid int) error {
	if err := unix.IoctlSetInt(t.ports[0].fd, unix.TUNSETOWNER, uid); err != nil {
		return fmt.Errorf("give it to user %d: %w", uid, err)
	}
	if err := unix.IoctlSetInt(t.ports[0].fd, unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("make it stay: %w", err)
	}
	return nil
}

// tapError adds the tap's name to an error, and what to do about it if known.
func tapError(name string, err error) error {
	if strings.Contains(name, "%") {
		name = "of a new name"
	}
	help := ""
	switch {
	case errors.Is(err, fs.ErrNotExist):
		help = " (modprobe tun)"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		help = " (it needs CAP_NET_ADMIN, or a tap made by: ip tuntap add NAME mode tap vnet_hdr user USER)"
	case errors.Is(err, unix.EBUSY):
		help = " (another process uses it)"
	case errors.Is(err, unix.EINVAL):
		help = " (was it made without multi_queue?)"
	}
	return fmt.Errorf("tap %s: %w%s", name, err, help)
}
