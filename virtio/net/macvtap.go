package net

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	stdnet "net"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/govmm/govmm/internal/netproc"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// macvtap is an interface of kind macvtap: frames that come to the interface that it is on,
// with its address, go to the queues, and frames of the queues go out there. It is this
// process's alone, and stays down until the process may run the guest.
//
// What needs a privilege after that, a process beside does, see [KeepMacvtap].
type macvtap struct {
	name   string
	index  int
	on     string // the interface that it is on
	node   string // /dev/tapN
	queues []int  // descriptors, detached
	keeper *netproc.Messages
}

// MacvtapProcess is how this program starts the process that keeps a macvtap. A program that
// has macvtaps sets it before it makes a VM.
type MacvtapProcess struct {
	// Command starts a process that calls [KeepMacvtap] with its last argument, which is
	// added. Empty: there are no macvtaps.
	Command []string
	// Sandbox is the mode of its sandbox.
	Sandbox string
}

// MacvtapStart is this program's.
var MacvtapStart MacvtapProcess

// mostNames is how many names are tried for a macvtap that has none.
const mostNames = 4096

// The numbers of interfaces that are made.
const (
	firstIndex = 1 << 20
	indexes    = 1 << 24
)

// newMacvtap makes the macvtap of the options, or finds it, and opens so many queues.
func newMacvtap(o Options, queues int) (_ *macvtap, err error) {
	fail := func(err error) (*macvtap, error) { return nil, macvtapError(o.Macvtap, err) }
	links, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fail(err)
	}
	defer links.Close()
	link, err := links.LinkByName(o.Macvtap)
	if err != nil {
		return fail(err)
	}
	m := &macvtap{}
	_, found := link.(*netlink.Macvtap)
	switch {
	case found && o.Name != "":
		return nil, fmt.Errorf("macvtap %s: it is a macvtap, which is used as it is: expected no name=, or the name of another interface", o.Macvtap)
	case !found:
		if link, err = makeMacvtap(links, link, o); err != nil {
			return fail(err)
		}
	}
	m.name, m.index, m.on = link.Attrs().Name, link.Attrs().Index, o.Macvtap
	if found {
		if on, err := links.LinkByIndex(link.Attrs().ParentIndex); err == nil { // it may be of another namespace
			m.on = on.Attrs().Name
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(macvtapError(m.name, err), m.end())
		}
	}()
	if err := m.keep(!found); err != nil {
		if !found {
			err = errors.Join(err, links.LinkDel(link))
		}
		return nil, err
	}
	return m, m.open(queues)
}

// makeMacvtap makes one on an interface. It stays down. All multicast passes, since the guest
// does not tell which it wants.
func makeMacvtap(links *netlink.Handle, on netlink.Link, o Options) (netlink.Link, error) {
	if have := mtuOf(on); o.MTU > have {
		return nil, fmt.Errorf("expected an MTU of at least %d at %s, found %d", o.MTU, o.Macvtap, have)
	}
	if o.MAC == (MAC{}) { // a guest that comes brings its own
		o.MAC = randomMAC()
	}
	made := &netlink.Macvtap{Macvlan: netlink.Macvlan{LinkAttrs: netlink.NewLinkAttrs(), Mode: netlink.MACVLAN_MODE_BRIDGE}}
	made.ParentIndex, made.MTU, made.HardwareAddr = on.Attrs().Index, int(o.MTU), o.MAC[:]
	// Devices of all network namespaces are in one /dev, by the number of the interface, which
	// the kernel counts in each from 1.
	made.Index = firstIndex + rand.IntN(indexes)
	err := error(unix.EEXIST)
	for i := 0; i < mostNames && errors.Is(err, unix.EEXIST); i++ {
		made.Name = o.Name
		if o.Name == "" {
			made.Name = "govmm" + strconv.Itoa(i)
		}
		if err = links.LinkAdd(made); o.Name != "" {
			break
		}
	}
	if err != nil {
		return nil, makeError(made.Name, o.Macvtap, err)
	}
	link, err := links.LinkByName(made.Name)
	if err == nil {
		err = silence(links, link)
	}
	if err == nil {
		err = links.LinkSetAllmulticastOn(link)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make %s: %w", made.Name, err), links.LinkDel(made))
	}
	return link, nil
}

// makeError says why a macvtap cannot be made.
func makeError(name, on string, err error) error {
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		return errors.New("this host's kernel has no macvtap (modprobe macvtap, or a kernel with CONFIG_MACVTAP)")
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("make %s: an interface of that name exists already (macvtap=%s uses it, if it is a macvtap)", name, name)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("make %s: %w (is %s a port of a bridge, or of another interface?)", name, err, on)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("make %s: %w (%s is of a kind that can have none)", name, err, on)
	}
	return fmt.Errorf("make %s: %w", name, err)
}

// open opens the queues, and locks the first. Each is a queue of the interface until it is
// detached, but it is down, or nobody else has it.
func (m *macvtap) open(queues int) error {
	var err error
	if m.node, err = m.device(); err != nil {
		return err
	}
	for i := range queues {
		fd, err := unix.Open(m.node, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: m.node, Err: err}
		}
		m.queues = append(m.queues, fd)
		if i == 0 {
			if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
				return fmt.Errorf("%w (another process uses it)", unix.EBUSY)
			} else if err != nil {
				return fmt.Errorf("lock %s: %w", m.node, err)
			}
		}
		for _, set := range []struct {
			call  uint
			name  string
			flags uint16
		}{
			{unix.TUNSETIFF, "TUNSETIFF", unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE},
			{unix.TUNSETQUEUE, "TUNSETQUEUE", unix.IFF_DETACH_QUEUE},
		} {
			req, err := unix.NewIfreq(m.name)
			if err == nil {
				req.SetUint16(set.flags)
				err = unix.IoctlIfreq(fd, set.call, req)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", set.name, err)
			}
		}
		if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, HeaderBytes); err != nil {
			return fmt.Errorf("set the length of headers: %w", err)
		}
	}
	return nil
}

// device is the path of the device, which must be that of this interface: another network
// namespace may have an interface of the same number.
func (m *macvtap) device() (string, error) {
	path := fmt.Sprintf("/dev/tap%d", m.index)
	raw, err := os.ReadFile(fmt.Sprintf("/sys/class/net/%s/tap%d/dev", m.name, m.index))
	if err != nil {
		return "", fmt.Errorf("find its device: %w (is /sys of another network namespace?)", err)
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(raw), "%d:%d", &major, &minor); err != nil {
		return "", fmt.Errorf("find its device: %.40q: %w", raw, err)
	}
	var st unix.Stat_t
	switch err := unix.Stat(path, &st); {
	case errors.Is(err, unix.ENOENT):
		return "", fmt.Errorf("%s does not exist (make it: mknod %s c %d %d)", path, path, major, minor)
	case err != nil:
		return "", &os.PathError{Op: "stat", Path: path, Err: err}
	case st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(major, minor):
		return "", fmt.Errorf("%s is another one's: expected device %d:%d, found %d:%d (is it of another network namespace?)",
			path, major, minor, unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	return path, nil
}

// keeperConfig is what [KeepMacvtap] is told.
type keeperConfig struct {
	Index   int    `json:"index"`
	On      string `json:"on"`
	Made    bool   `json:"made,omitempty"` // by govmm
	Sandbox string `json:"sandbox,omitempty"`
}

// keep starts the process that keeps it.
func (m *macvtap) keep(made bool) error {
	how := MacvtapStart
	if len(how.Command) == 0 {
		return errors.New("this program does not say how the process that keeps a macvtap is started")
	}
	config, err := json.Marshal(keeperConfig{m.index, m.on, made, how.Sandbox})
	if err != nil {
		return err
	}
	m.keeper, err = netproc.Spawn(append(how.Command[:len(how.Command):len(how.Command)], string(config)), &syscall.SysProcAttr{Setsid: true})
	if err != nil {
		return fmt.Errorf("start the process that keeps it: %w", err)
	}
	return nil
}

// ports returns n queues, of which the macvtap keeps duplicates if they are to be used
// again.
func (m *macvtap) ports(n int, again bool) (ports []*tapPort, err error) {
	for i := range n {
		fd := m.queues[i]
		if again {
			if fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
				return ports, err
			}
		} else {
			m.queues[i] = -1
		}
		p, err := newPort(fd, m.node)
		if err != nil {
			return ports, err
		}
		ports = append(ports, p)
	}
	return ports, nil
}

// set has the keeper change what differs: the guest runs here, or not.
func (m *macvtap) set(taken bool, o Options) error {
	r := netproc.Request{MAC: o.MAC, Taken: taken}
	if !o.Arriving { // one that exists is not changed for a guest that comes
		r.MTU = o.MTU
	}
	if err := m.keeper.Ask(r); err != nil {
		return macvtapError(m.name, err)
	}
	return nil
}

// end closes everything. A macvtap that was made is gone when it returns, unless another
// process goes on with it.
func (m *macvtap) end() error {
	err := m.close()
	if m.keeper != nil {
		err = errors.Join(err, m.keeper.Finish())
	}
	return err
}

// close closes the queues.
func (m *macvtap) close() (err error) {
	for _, fd := range m.queues {
		if fd >= 0 {
			err = errors.Join(err, unix.Close(fd))
		}
	}
	m.queues = nil
	return err
}

// openMacvtap is [OpenTap] of a macvtap.
func openMacvtap(o Options) (_ *Tap, err error) {
	m := o.macvtap
	if m == nil {
		if o.Arriving {
			return nil, fmt.Errorf("macvtap %s: it is opened before a guest comes: give --net macvtap=LINK here", o.Macvtap)
		}
		if m, err = newMacvtap(o, o.Queues); err != nil {
			return nil, err
		}
	}
	t := &Tap{name: m.name, index: m.index, opt: o, multi: true, mtu: o.MTU, pairs: 1, macvtap: m}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Close())
		}
	}()
	if t.ports, err = m.ports(o.Queues, o.macvtap != nil); err != nil {
		return nil, macvtapError(m.name, err)
	}
	if err := t.followLinks(); err != nil {
		return nil, macvtapError(m.name, err)
	}
	link, err := t.links.LinkByIndex(t.index)
	if err != nil {
		return nil, macvtapError(m.name, err)
	}
	switch have := mtuOf(link); {
	case t.mtu == 0:
		t.mtu = have
	case have < t.mtu && o.Arriving:
		return nil, fmt.Errorf("macvtap %s: expected an MTU of %d, as the guest was told, found %d (ip link set %s mtu %d, which %s must have, too)", m.name, t.mtu, have, m.name, t.mtu, m.on)
	}
	if err := t.reserve(); err != nil {
		return nil, macvtapError(m.name, err)
	}
	return t, nil
}

// uso reports whether this kernel has segmentation of UDP, which macvtaps have from Linux
// 6.2 on and do not tell.
func uso() bool {
	var u unix.Utsname
	var major, minor int
	if unix.Uname(&u) != nil {
		return false
	}
	_, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return err == nil && (major > 6 || major == 6 && minor >= 2)
}

// KeepMacvtap is the process beside a VM's that keeps its macvtap: it may change this one
// interface, and the VM's process none. It sets it up for the guest, and down for
// another process, and when the VM has ended, however it did, the macvtap goes if govmm
// has made it. config is the last argument; enter is called before the VM is listened to.
func KeepMacvtap(config string, enter func(mode string) error) error {
	var c keeperConfig
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		return fmt.Errorf("configuration %.80q: %w", config, err)
	}
	links, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	m, err := netproc.OpenMessages(netproc.SpawnedFD)
	if err != nil {
		return err
	}
	if err := enter(c.Sandbox); err != nil {
		return err
	}
	err = m.Answer(func(r netproc.Request) error { return c.set(links, r) })
	if c.Made {
		link, gone := links.LinkByIndex(c.Index)
		if _, ok := link.(*netlink.Macvtap); gone == nil && ok {
			err = errors.Join(err, links.LinkDel(link))
		}
	}
	return err
}

// set changes what differs.
func (c keeperConfig) set(links *netlink.Handle, r netproc.Request) error {
	link, err := links.LinkByIndex(c.Index)
	if err != nil {
		if !r.Taken {
			return nil // it is gone
		}
		return err
	}
	have := link.Attrs()
	up := have.Flags&stdnet.FlagUp != 0
	if !r.Taken {
		if up {
			err = links.LinkSetDown(link)
		}
		if errors.Is(err, unix.EPERM) { // it stays as its owner has set it
			return nil
		}
		return err
	}
	if mac := r.MAC[:]; have.HardwareAddr.String() != stdnet.HardwareAddr(mac).String() {
		if err := links.LinkSetHardwareAddr(link, mac); err != nil {
			return fmt.Errorf("set its address to the guest's, %s: %w%s", MAC(r.MAC), err, c.help(err))
		}
	}
	if r.MTU != 0 && have.MTU != int(r.MTU) {
		if err := links.LinkSetMTU(link, int(r.MTU)); err != nil {
			return fmt.Errorf("set its MTU to %d: %w%s", r.MTU, err, c.help(err))
		}
	}
	if !up {
		if err := links.LinkSetUp(link); err != nil {
			return fmt.Errorf("set it up: %w%s", err, c.help(err))
		}
	}
	return nil
}

// help is what to do about an error.
func (c keeperConfig) help(err error) string {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Sprintf(" (%s, or another interface on it, has the guest's address)", c.On)
	case errors.Is(err, unix.EPERM):
		return " (it needs CAP_NET_ADMIN, or a macvtap that is set so before)"
	case errors.Is(err, unix.EINVAL):
		return fmt.Sprintf(" (it may be no larger than that of %s)", c.On)
	case errors.Is(err, unix.ENETDOWN):
		return fmt.Sprintf(" (ip link set %s up)", c.On)
	}
	return ""
}

// macvtapError adds the name to an error, and what to do about it if known.
func macvtapError(name string, err error) error {
	if strings.HasPrefix(err.Error(), "macvtap ") {
		return err
	}
	help := ""
	var none netlink.LinkNotFoundError
	switch {
	case errors.As(err, &none):
		return fmt.Errorf("macvtap %s: the host has no interface of that name (ip -br link lists them)", name)
	case errors.Is(err, unix.EPERM):
		help = " (it needs CAP_NET_ADMIN, or a macvtap made by: ip link add link LINK name NAME type macvtap mode bridge)"
	case errors.Is(err, fs.ErrPermission):
		help = " (chown the device to the user; docs/network.md has a rule of udev)"
	}
	return fmt.Errorf("macvtap %s: %w%s", name, err, help)
}
