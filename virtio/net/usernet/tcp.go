package usernet

import (
	"context"
	"errors"
	"io"
	stdnet "net"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// dialTime is how long the host tries to connect.
	dialTime = 10 * time.Second
	// keepalive is how long a connection is silent before both its ends are asked
	// whether they are still there.
	keepalive = 60 * time.Second
)

func link(b []byte) tcpip.LinkAddress { return tcpip.LinkAddress(b) }

func full(a netip.Addr, port uint16) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFrom4(a.As4()), Port: port}
}

func addrPort(a tcpip.Address, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4(a.As4()), port)
}

// connect makes the host's side of a connection that the guest has asked for, and then the
// guest's. It has a goroutine of its own.
func (n *Network) connect(r *tcp.ForwarderRequest) {
	id := r.ID()
	to := addrPort(id.LocalAddress, id.LocalPort)
	if !n.connections.take() {
		r.Complete(true)
		return
	}
	defer n.connections.give()
	host, err := n.dial(to)
	if err != nil {
		r.Complete(true)
		return
	}
	var wq waiter.Queue
	ep, terr := r.CreateEndpoint(&wq)
	r.Complete(false)
	if terr != nil {
		_ = host.Close()
		return
	}
	relay(host, newGuestConn(&wq, ep))
}

// errReach: the guest may not connect to this address.
var errReach = errors.New("not an address for the guest")

// dial connects to what the guest calls to.
func (n *Network) dial(to netip.AddrPort) (*stdnet.TCPConn, error) {
	if to == netip.AddrPortFrom(gatewayIP, dnsPort) && len(n.cfg.Servers) > 0 {
		to = n.cfg.Servers[0]
	} else if a, ok := n.reach(to); ok {
		to = a
	} else {
		return nil, errReach
	}
	d := stdnet.Dialer{Timeout: dialTime, KeepAlive: keepalive}
	c, err := d.Dial("tcp", to.String())
	if err != nil {
		return nil, err
	}
	return c.(*stdnet.TCPConn), nil
}

// guestConn is the guest's end of a connection.
type guestConn struct {
	*gonet.TCPConn
	ep tcpip.Endpoint
}

func newGuestConn(wq *waiter.Queue, ep tcpip.Endpoint) guestConn {
	idle := tcpip.KeepaliveIdleOption(keepalive)
	_ = ep.SetSockOpt(&idle) // the stack has it
	ep.SocketOptions().SetKeepAlive(true)
	ep.SocketOptions().SetDelayOption(false)
	return guestConn{gonet.NewTCPConn(wq, ep), ep}
}

// Reset ends it by a RST.
func (c guestConn) Reset() {
	c.ep.Abort()
	_ = c.Close()
}

// reset has a connection of the host end by a RST, unless it ends in order: also when this
// process ends, in whatever way. Its peer must not take that for the end of the data.
func reset(c *stdnet.TCPConn) { _ = c.SetLinger(0) }

// relay moves bytes both ways until both have ended, or one has failed.
func relay(host *stdnet.TCPConn, guest guestConn) {
	reset(host)
	var both sync.WaitGroup
	var out, in error
	both.Go(func() {
		if out = move(host, guest); out != nil {
			_ = host.Close()
			guest.Reset()
		}
	})
	both.Go(func() {
		if in = move(guest, host); in != nil {
			_ = host.Close()
			guest.Reset()
		}
	})
	both.Wait()
	if out == nil && in == nil {
		_ = host.SetLinger(-1)
		_ = host.Close()
		_ = guest.Close()
	}
}

// half is a connection each direction of which ends by itself.
type half interface {
	io.Reader
	io.Writer
	CloseWrite() error
}

// buffers are of the pieces in which bytes are moved.
var buffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// move moves bytes until from has no more, and tells to.
func move(to, from half) error {
	b := buffers.Get().(*[64 << 10]byte)
	defer buffers.Put(b)
	for {
		n, err := from.Read(b[:])
		if n > 0 {
			if _, err := to.Write(b[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return to.CloseWrite()
		}
		if err != nil {
			return err
		}
	}
}

// dialGuest connects to a port of the guest, from the gateway.
func (n *Network) dialGuest(port uint16) (guestConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), dialTime)
	defer cancel()
	var wq waiter.Queue
	ep, terr := n.stack.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, &wq)
	if terr != nil {
		return guestConn{}, errors.New(terr.String())
	}
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	terr = ep.Bind(full(gatewayIP, 0))
	if terr == nil {
		terr = ep.Connect(full(guestIP, port))
	}
	if _, started := terr.(*tcpip.ErrConnectStarted); started {
		select {
		case <-ctx.Done():
			ep.Abort()
			return guestConn{}, ctx.Err()
		case <-ready:
			terr = ep.LastError()
		}
	}
	if terr != nil {
		ep.Abort()
		return guestConn{}, errors.New(terr.String())
	}
	return newGuestConn(&wq, ep), nil
}
