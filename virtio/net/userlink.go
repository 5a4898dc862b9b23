package net

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/govmm/govmm/internal/netproc"
	"golang.org/x/sys/unix"
)

// UserNetProcess is how this program starts the process of a user network. A program that
// has such networks sets it before it makes a VM.
type UserNetProcess struct {
	// Command starts a process that calls netproc.Supervise; its last argument, a
	// [UserNetConfig] in JSON, is added. Empty: there are no user networks.
	Command []string
	// Sandbox is the mode of its sandbox.
	Sandbox string
	// UID and GID are whom it becomes, if this process is root's and Become is set.
	Become   bool
	UID, GID uint32
}

// UserNetStart is this program's.
var UserNetStart UserNetProcess

// userOffloads are those that the process of a user network does. Segments of TCP are never
// cut on the way to the host, which takes a stream; datagrams are cut there.
const userOffloads = FeatureCsum | FeatureHostTSO4 | FeatureHostTSO6 | FeatureHostECN | FeatureHostUSO |
	FeatureGuestCsum | FeatureGuestTSO4 | FeatureGuestTSO6 | FeatureGuestECN | FeatureGuestUSO4 | FeatureGuestUSO6

// starter starts the processes of one network.
type starter struct{ *netproc.Starter }

// start starts the process that starts the network's.
func (u *UserNet) prepare() error {
	if u.start != nil {
		return nil
	}
	how := UserNetStart
	if len(how.Command) == 0 {
		return errors.New("net user: this program does not say how the process of a user network is started")
	}
	config, err := json.Marshal(UserNetConfig{UserNet: *u, Sandbox: how.Sandbox})
	if err != nil {
		return err
	}
	attr := &syscall.SysProcAttr{Setsid: true} // no key, and no end of a terminal's session reaches it
	if how.Become && os.Geteuid() == 0 {
		attr.Credential = &syscall.Credential{Uid: how.UID, Gid: how.GID}
		if slices.ContainsFunc(u.Forwards, func(f Forward) bool { return f.Host.Port() < unprivilegedPort() }) {
			attr.AmbientCaps = []uintptr{unix.CAP_NET_BIND_SERVICE}
		}
	}
	s, err := netproc.NewStarter(append(how.Command[:len(how.Command):len(how.Command)], string(config)), attr)
	if err != nil {
		return fmt.Errorf("net user: start the network's process: %w", err)
	}
	u.start = &starter{s}
	return nil
}

// unprivilegedPort is the lowest port for which no privilege is needed.
func unprivilegedPort() uint16 {
	raw, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if n, perr := strconv.ParseUint(strings.TrimSpace(string(raw)), 10, 16); err == nil && perr == nil {
		return uint16(n)
	}
	return 1024
}

// userLink is a link to the process of a user network.
type userLink struct {
	*stream
	mtu uint16
	mac MAC
	net UserNet
	own *starter // nil: it is the spec's, and stays
}

var _ link = (*userLink)(nil)

// openUser starts the process of the network. Its ports of the host are not taken yet.
func openUser(o Options, log *slog.Logger) (*userLink, error) {
	l := newUserLink(o, log)
	if l.net.start == nil {
		if o.Arriving {
			return nil, errors.New("net user: its process is started before a guest comes: give --net user here")
		}
		if err := l.net.prepare(); err != nil {
			return nil, err
		}
		l.own = l.net.start
	}
	if err := l.connect(); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func newUserLink(o Options, log *slog.Logger) *userLink {
	l := &userLink{stream: newStream("net user", o.Queues, log), mtu: o.MTU, mac: o.MAC, net: o.UserNet}
	if l.mtu == 0 {
		l.mtu = userMTU
	}
	l.headers, l.offloads = true, userOffloads
	l.dial = func(st streamState) (*wire, error) { return l.run(l.net.start, st) }
	return l
}

// run starts a process and tells it the state.
func (l *userLink) run(s *starter, st streamState) (*wire, error) {
	p, err := s.Start()
	if err != nil {
		return nil, err
	}
	if p.Last != "" {
		l.log.Warn("the process of the network has ended", "how", p.Last)
	}
	tell := func(st streamState) error {
		return p.Messages.Ask(netproc.Request{MTU: l.mtu, MAC: l.mac, Offloads: st.guest, Taken: st.taken})
	}
	if err := tell(st); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	w, err := newWire(userConn{p.Frames, p}, true)
	if err != nil {
		return nil, err
	}
	w.tell = tell
	return w, nil
}

// userConn is the connection to a process, which ends with it.
type userConn struct {
	*os.File
	process *netproc.Process
}

// Close implements [netproc.Conn].
func (c userConn) Close() error { return c.process.Close() }

// Take takes the host's ports.
func (l *userLink) Take() error { return l.take(true) }

// Yield gives the host's ports to the process at the destination. Connections stay: the
// guest may come back.
func (l *userLink) Yield() error { return l.take(false) }

// MTU is that of the guest's link.
func (l *userLink) MTU() uint16 { return l.mtu }

// Close ends the process, and all connections with it.
func (l *userLink) Close() error {
	err := l.stream.Close()
	if l.own != nil {
		err = errors.Join(err, l.own.Close())
	}
	return err
}
