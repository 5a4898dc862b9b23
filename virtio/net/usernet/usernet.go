// Package usernet is a network for one guest in a process of its own, for which no privilege
// is needed: gVisor's network stack, which gvisor-tap-vsock is made of, ends the guest's
// connections, and this process makes them again with sockets of the host.
//
// The network is 192.168.127.0/24, as gvproxy's is: the guest is 192.168.127.2, the gateway
// and name server .1. There is no IPv6. The addresses are the same at every host, so a guest
// that moves keeps its own, and finds the same gateway.
//
// Everything is bounded: connections, flows, what waits, and for how long.
package usernet

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"

	"github.com/govmm/govmm/internal/netproc"
	"github.com/govmm/govmm/virtio/net"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// The network.
var (
	gatewayIP = netip.AddrFrom4([4]byte{192, 168, 127, 1})
	guestIP   = netip.AddrFrom4([4]byte{192, 168, 127, 2})
	// hostIP is the host's loopback address, if the guest may reach it.
	hostIP = netip.AddrFrom4([4]byte{192, 168, 127, 254})
	subnet = netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, 127, 0}), 24)

	gatewayMAC = net.MAC{0x52, 0x55, 192, 168, 127, 1}
)

// Limits.
const (
	// maxConnections are TCP connections, in both directions together.
	maxConnections = 1024
	// maxHandshakes are those of them that wait for the host's side.
	maxHandshakes = 256
	// maxFlows are ports of the guest, and peers of forwards, that use UDP.
	maxFlows = 1024
	// maxQueries are questions to name servers that are under way.
	maxQueries = 128
	// window is how much of a connection waits in the stack, each way.
	window = 512 << 10
	// maxWaiting is how many bytes of frames wait for the guest.
	maxWaiting = 4 << 20

	nic = 1
)

// Config is what the network is made of.
type Config struct {
	net.UserNetConfig
	// Servers are the host's name servers.
	Servers []netip.AddrPort
}

// Network is one guest's network.
type Network struct {
	cfg   Config
	mtu   uint16
	link  *endpoint
	stack *stack.Stack
	// guestMAC is where the guest's address is. It belongs to who moves its frames.
	guestMAC net.MAC

	connections limit
	flows       limit
	queries     limit
	udp         flows

	ports    sync.Mutex // guards forwards
	forwards []closer
}

type closer interface{ Close() error }

// limit counts what is bounded.
type limit struct {
	most, now atomic.Int64
}

// take takes a place, if there is one.
func (l *limit) take() bool {
	if l.now.Add(1) > l.most.Load() {
		l.now.Add(-1)
		return false
	}
	return true
}

func (l *limit) give() { l.now.Add(-1) }

// New makes a network whose guest, with this address, is at the other end of a stream of frames
// with headers.
func New(cfg Config, mtu uint16, guest net.MAC, frames netproc.Conn) (*Network, error) {
	out, err := netproc.NewWriter(frames, maxWaiting)
	if err != nil {
		return nil, err
	}
	in, err := netproc.NewReader(frames, headerBytes+etherHeader, headerBytes+maxFrame)
	if err != nil {
		return nil, err
	}
	n := &Network{cfg: cfg, mtu: mtu, link: &endpoint{mtu: uint32(mtu), mac: gatewayMAC, in: in, out: out}}
	n.connections.most.Store(maxConnections)
	n.flows.most.Store(maxFlows)
	n.queries.most.Store(maxQueries)
	n.link.accept = n.accept
	n.udp.init(n)
	if n.stack, err = newStack(n.link, gatewayIP, subnet); err != nil {
		return nil, err
	}
	n.setGuest(guest)
	// Packets to any address are for the stack, and it answers from any.
	for _, err := range []tcpip.Error{n.stack.SetSpoofing(nic, true), n.stack.SetPromiscuousMode(nic, true)} {
		if err != nil {
			return nil, fmt.Errorf("user network: %s", err)
		}
	}
	n.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(n.stack, window, maxHandshakes, n.connect).HandlePacket)
	n.stack.SetTransportProtocolHandler(udp.ProtocolNumber, n.datagram)
	return n, nil
}

// newStack makes a stack of one interface with one address.
func newStack(link stack.LinkEndpoint, ip netip.Addr, net netip.Prefix) (*stack.Stack, error) {
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: 4 << 10, Default: window, Max: window}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: 4 << 10, Default: window, Max: window}
	sack, moderate := tcpip.TCPSACKEnabled(true), tcpip.TCPModerateReceiveBufferOption(false)
	for _, option := range []tcpip.SettableTransportProtocolOption{&receive, &send, &sack, &moderate} {
		if err := s.SetTransportProtocolOption(tcp.ProtocolNumber, option); err != nil {
			return nil, fmt.Errorf("user network: %T: %s", option, err)
		}
	}
	if err := s.CreateNIC(nic, link); err != nil {
		return nil, fmt.Errorf("user network: %s", err)
	}
	address := tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4(ip.As4()), PrefixLen: net.Bits()}}
	if err := s.AddProtocolAddress(nic, address, stack.AddressProperties{}); err != nil {
		return nil, fmt.Errorf("user network: %s", err)
	}
	to, err := tcpip.NewSubnet(tcpip.AddrFrom4(net.Addr().As4()), tcpip.MaskFromBytes(mask(net)))
	if err != nil {
		return nil, err
	}
	s.SetRouteTable([]tcpip.Route{{Destination: to, NIC: nic}})
	return s, nil
}

// mask is a network's mask.
func mask(p netip.Prefix) []byte {
	m := make([]byte, 4)
	for i := range p.Bits() {
		m[i/8] |= 0x80 >> (i % 8)
	}
	return m
}

// Run moves frames of the guest into the stack until the stream ends.
func (n *Network) Run() error { return n.link.run() }

// Do carries out a request: see [netproc.Messages.Answer].
func (n *Network) Do(r netproc.Request) error {
	n.link.guest.Store(r.Offloads)
	if r.Taken {
		return n.listen()
	}
	return n.unlisten()
}

// errMTU: a process makes one network.
var errMTU = errors.New("the MTU of a user network cannot change")

// Serve is what the process of a network does, with the descriptors that it was started with,
// until the VM's process ends. lock gives up its rights, when everything is open.
func Serve(cfg Config, lock func() error) error {
	messages, err := netproc.OpenMessages(netproc.MessagesFD)
	if err != nil {
		return err
	}
	if err := setNonblock(netproc.FramesFD); err != nil {
		return err
	}
	frames := os.NewFile(netproc.FramesFD, "frames")
	if err := lock(); err != nil {
		return err
	}
	var n *Network
	ended := make(chan error, 2)
	go func() {
		ended <- messages.Answer(func(r netproc.Request) (err error) {
			switch {
			case n == nil:
				if n, err = New(cfg, r.MTU, r.MAC, frames); err != nil {
					return err
				}
				go func() { ended <- n.Run() }()
			case r.MTU != n.mtu:
				return errMTU
			}
			return n.Do(r)
		})
	}()
	return <-ended // connections end with the process: see reset
}
