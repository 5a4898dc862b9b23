package net

import (
	"errors"
	"fmt"
	"io/fs"
	stdnet "net"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// OpenTap opens the tap of the options, or makes it, and checks whether it can keep
// what the options promise. A tap that is made disappears with the VMM, unless it has
// an owner. Nothing of a tap that exists is changed before [Tap.Take], except that a
// single queue is taken: others find the tap busy.
func OpenTap(o Options) (_ *Tap, err error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	if o.Macvtap != "" {
		return openMacvtap(o)
	}
	t := &Tap{name: o.Tap, opt: o, multi: o.Queues > 1, mtu: o.MTU, pairs: 1}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Close())
		}
	}()
	if err := t.followLinks(); err != nil {
		return nil, tapError(o.Tap, err)
	}
	shared := false
	if o.Tap == "" {
		t.name, t.made = "govmm%d", true
	} else if shared, err = t.find(); err != nil {
		return nil, err
	}
	if _, err := t.bridge(); err != nil { // before it is too late to say so
		return nil, err
	}
	if err := t.openQueues(shared); err != nil {
		return nil, err
	}
	link, err := t.links.LinkByName(t.name)
	if err != nil {
		return nil, tapError(t.name, err)
	}
	t.index = link.Attrs().Index
	if !t.made {
		return t, nil
	}
	// The host's end needs an address other than the guest's. A bridge takes the
	// smallest address of its ports, so this one begins high.
	mac := o.MAC
	mac[0] = 0xfe
	if err := t.links.LinkSetHardwareAddr(link, stdnet.HardwareAddr(mac[:])); err != nil {
		return nil, tapError(t.name, fmt.Errorf("set its address to %s: %w", mac, err))
	}
	if err := silence(t.links, link); err != nil {
		return nil, tapError(t.name, err)
	}
	if t.mtu == 0 {
		t.mtu = mtuOf(link)
	}
	return t, t.configure(link)
}

// followLinks opens what tells of the host's interfaces.
func (t *Tap) followLinks() (err error) {
	if t.links, err = netlink.NewHandle(unix.NETLINK_ROUTE); err == nil {
		t.watch, err = watchLinks(t.linkChanged)
	}
	return err
}

// find looks for the tap of the options, and reports what cannot be changed about it.
// shared says that others have queues of it.
func (t *Tap) find() (shared bool, err error) {
	link, err := t.links.LinkByName(t.name)
	var none netlink.LinkNotFoundError
	if errors.As(err, &none) {
		t.made = true
		return false, nil
	} else if err != nil {
		return false, tapError(t.name, err)
	}
	tap, ok := link.(*netlink.Tuntap)
	if !ok || tap.Mode != netlink.TUNTAP_MODE_TAP {
		other := "macvtap=" + t.name + " puts the guest on its network"
		if link.Type() == "bridge" {
			other = "tap,bridge=" + t.name + " makes a tap that is a port of it"
		}
		return false, fmt.Errorf("tap %s: the host's interface of that name is not a tap, but a %s (%s)", t.name, link.Type(), other)
	}
	multi, shared := tap.Flags&netlink.TUNTAP_MULTI_QUEUE != 0, tap.Queues+tap.DisabledQueues > 0
	const format = netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR
	switch have := mtuOf(link); {
	case !multi && t.opt.Queues > 1:
		return false, fmt.Errorf("tap %s: expected one that can have %d queues, found one with a single queue (it was made without multi_queue)", t.name, t.opt.Queues)
	case shared && multi && tap.Owner != 0 && int(tap.Owner) != os.Geteuid() && !isNetAdmin():
		return false, tapError(t.name, unix.EPERM)
	case shared && multi && tap.Flags&format != format:
		return false, fmt.Errorf("tap %s: another process uses it in another format (made without vnet_hdr)", t.name)
	case t.mtu == 0:
		t.mtu = have
	case have < t.mtu && t.opt.Arriving:
		return false, fmt.Errorf("tap %s: expected an MTU of %d, as the guest was told, found %d (ip link set %s mtu %d)", t.name, t.mtu, have, t.name, t.mtu)
	}
	t.multi = multi
	return shared && multi, nil
}

// isNetAdmin reports whether this thread has CAP_NET_ADMIN.
func isNetAdmin() bool {
	var data [2]unix.CapUserData
	err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0])
	return err == nil && data[0].Effective&(1<<unix.CAP_NET_ADMIN) != 0
}

func mtuOf(link netlink.Link) uint16 { return uint16(min(link.Attrs().MTU, 65535)) }

// Take makes the tap the guest's link, when this process has got the right to run the
// guest: it gets the MTU, the bridge and the state "up" of the options, a carrier, and
// its queues. Only what differs is changed, so that a tap that was prepared for this
// user needs no privilege. What has arrived before is discarded. To take it again does
// nothing.
func (t *Tap) Take() (err error) {
	t.queues.Lock()
	defer t.queues.Unlock()
	if t.taken {
		return nil
	}
	if t.inherited && !t.ready { // how many are attached is not known
		t.attached = 0
		if err := t.attach(len(t.ports)); err != nil {
			return tapError(t.name, err)
		}
	}
	if err := t.attach(t.pairs); err != nil {
		return errors.Join(tapError(t.name, err), t.attach(0))
	}
	if err := t.plug(); err != nil {
		return errors.Join(err, t.attach(0))
	}
	t.taken, t.ready = true, true
	t.tellLink()
	return nil
}

// OnLink has f called when the link goes up or down: the interface is up and has a
// carrier, or not. It is up when f is set. Before the tap is taken there is no link
// to tell of. f must not call methods of the tap.
func (t *Tap) OnLink(f func(up bool)) {
	t.queues.Lock()
	defer t.queues.Unlock()
	t.onLink, t.linkUp = f, true
}

func (t *Tap) linkChanged() {
	t.queues.Lock()
	defer t.queues.Unlock()
	t.tellLink()
}

// tellLink calls onLink if the link has changed. queues is held.
func (t *Tap) tellLink() {
	if !t.taken || t.onLink == nil {
		return
	}
	link, err := t.links.LinkByIndex(t.index)
	var none netlink.LinkNotFoundError
	if err != nil && !errors.As(err, &none) {
		return // the host does not say
	}
	up := err == nil && link.Attrs().RawFlags&unix.IFF_LOWER_UP != 0
	if up != t.linkUp {
		t.linkUp = up
		t.onLink(up)
	}
}

// plug does what is to be done once, and sets the carrier. queues is held.
func (t *Tap) plug() error {
	if t.macvtap != nil {
		if !t.ready && !t.inherited {
			for _, p := range t.ports {
				p.discard(maxQueued)
			}
		}
		return t.macvtap.set(true, t.opt)
	}
	if !t.ready && !t.inherited {
		if t.made && t.opt.Owner != nil {
			if err := t.setOwner(int(*t.opt.Owner)); err != nil {
				return tapError(t.name, err)
			}
		}
		if err := t.setHeader(); err != nil {
			return tapError(t.name, err)
		}
		if !t.multi {
			t.ports[0].discard(maxQueued)
		}
		if !t.made { // otherwise it was done when it was made
			link, err := t.links.LinkByIndex(t.index)
			if err != nil {
				return tapError(t.name, err)
			}
			if err := t.configure(link); err != nil {
				return err
			}
		}
	}
	if err := t.setCarrier(true); err != nil {
		return tapError(t.name, err)
	}
	return nil
}

// Yield gives the tap to another process that may share it: the queues of a tap that can
// have several are detached, since frames that go to them would be lost. Who shares it cannot
// be seen: the other one's queues become queues of the tap when it takes it.
func (t *Tap) Yield() error {
	t.queues.Lock()
	defer t.queues.Unlock()
	if !t.taken || !t.multi {
		return nil
	}
	if err := t.attach(0); err != nil {
		if _, gone := t.links.LinkByIndex(t.index); gone != nil {
			return nil
		}
		return tapError(t.name, err)
	}
	t.taken = false
	if t.macvtap != nil {
		return t.macvtap.set(false, t.opt)
	}
	return nil
}

// configure changes what differs from the options.
func (t *Tap) configure(link netlink.Link) error {
	have, want := link.Attrs(), int(t.opt.MTU)
	bridge, err := t.bridge()
	if err != nil {
		return err
	}
	if bridge != nil && t.made && t.opt.Arriving && want != 0 {
		// A bridge takes the smallest MTU of its ports: a guest that arrives does not
		// choose it for all others.
		want = max(want, bridge.Attrs().MTU)
	}
	if want != 0 && have.MTU != want && !(t.opt.Arriving && have.MTU > want) {
		if err := t.links.LinkSetMTU(link, want); err != nil {
			return tapError(t.name, fmt.Errorf("set its MTU to %d: %w", want, err))
		}
	}
	if bridge != nil && have.MasterIndex != bridge.Attrs().Index {
		if err := t.links.LinkSetMaster(link, bridge); err != nil {
			return tapError(t.name, fmt.Errorf("add it to bridge %s: %w", t.opt.Bridge, err))
		}
	}
	if have.Flags&stdnet.FlagUp == 0 {
		if err := t.links.LinkSetUp(link); err != nil {
			return tapError(t.name, fmt.Errorf("set it up: %w", err))
		}
	}
	return nil
}

// bridge is the bridge of the options; nil: none.
func (t *Tap) bridge() (netlink.Link, error) {
	name := t.opt.Bridge
	if name == "" {
		return nil, nil
	}
	bridge, err := t.links.LinkByName(name)
	var none netlink.LinkNotFoundError
	switch {
	case errors.As(err, &none):
		return nil, fmt.Errorf("tap %s: bridge %s does not exist (make it: ip link add %s type bridge; ip link set %s up)", t.name, name, name, name)
	case err != nil:
		return nil, tapError(t.name, err)
	case bridge.Type() != "bridge":
		return nil, fmt.Errorf("tap %s: %s is not a bridge, but a %s", t.name, name, bridge.Type())
	}
	return bridge, nil
}

// setHeader sets the length of the headers.
func (t *Tap) setHeader() error {
	fd := t.ports[0].fd
	have, err := unix.IoctlGetInt(fd, unix.TUNGETVNETHDRSZ)
	if err == nil && have != HeaderBytes {
		err = unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, HeaderBytes)
	}
	if err != nil {
		return fmt.Errorf("set the length of headers: %w", err)
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
	if strings.HasPrefix(err.Error(), "macvtap ") {
		return err
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
		help = " (is it used in another way than as a tap for frames with headers?)"
	}
	return fmt.Errorf("tap %s: %w%s", name, err, help)
}
