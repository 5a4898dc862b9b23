package usernet

import (
	"context"
	"errors"
	"fmt"
	stdnet "net"
	"net/netip"
	"os"
	"time"

	"github.com/govmm/govmm/virtio/net"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// listen takes the host's ports of the forwards: all or none. To take them again does nothing.
func (n *Network) listen() error {
	n.ports.Lock()
	defer n.ports.Unlock()
	if n.forwards != nil {
		return nil
	}
	var all []closer
	for _, f := range n.cfg.Forwards {
		c, err := n.forward(f)
		if err != nil {
			for _, c := range all {
				_ = c.Close()
			}
			var call *os.SyscallError
			if errors.As(err, &call) {
				err = call.Err
			}
			return fmt.Errorf("forward=%s: take port %d of this host: %w", f, f.Host.Port(), err)
		}
		all = append(all, c)
	}
	n.forwards = all
	return nil
}

// unlisten gives the ports back. Connections stay.
func (n *Network) unlisten() error {
	n.ports.Lock()
	defer n.ports.Unlock()
	for _, c := range n.forwards {
		_ = c.Close()
	}
	n.forwards = nil
	return nil
}

// forward takes one port.
func (n *Network) forward(f net.Forward) (closer, error) {
	if f.UDP {
		c, err := stdnet.ListenUDP("udp", stdnet.UDPAddrFromAddrPort(f.Host))
		if err == nil {
			go n.udp.forward(c, f.Guest)
		}
		return c, err
	}
	var config stdnet.ListenConfig
	config.SetMultipathTCP(false) // the sandbox knows TCP
	ln, err := config.Listen(context.Background(), "tcp", f.Host.String())
	if err != nil {
		return nil, err
	}
	go n.serve(ln.(*stdnet.TCPListener), f.Guest)
	return ln, nil
}

// serve brings connections to a port of the guest.
func (n *Network) serve(ln *stdnet.TCPListener, port uint16) {
	for {
		c, err := ln.AcceptTCP()
		if errors.Is(err, stdnet.ErrClosed) {
			return
		}
		if err != nil { // there are too many descriptors
			time.Sleep(10 * time.Millisecond)
			continue
		}
		reset(c)
		if !n.connections.take() {
			_ = c.Close()
			continue
		}
		go func() {
			defer n.connections.give()
			guest, err := n.dialGuest(port)
			if err != nil {
				_ = c.Close()
				return
			}
			relay(c, guest)
		}()
	}
}

// firstPeer is the first port of the gateway that is a peer of a forward.
const firstPeer = 32768

// peer is somebody who sends datagrams to a forward.
type peer struct {
	c     *stdnet.UDPConn // the forward's
	from  netip.AddrPort
	guest uint16
	used  time.Time
}

// forward brings datagrams to a port of the guest.
func (f *flows) forward(c *stdnet.UDPConn, guest uint16) {
	p := make([]byte, maxDatagram)
	ports := map[netip.AddrPort]uint16{}
	for {
		n, from, err := c.ReadFromUDPAddrPort(p)
		if errors.Is(err, stdnet.ErrClosed) {
			break
		}
		if err != nil {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		port := f.peerPort(c, from, guest, ports)
		if port != 0 {
			f.n.sendUDP(netip.AddrPortFrom(gatewayIP, port), guest, p[:n])
		}
	}
	f.table.Lock()
	defer f.table.Unlock()
	for _, port := range ports {
		if one := f.peers[port]; one != nil && one.c == c {
			f.drop(port)
		}
	}
}

// drop forgets a peer. table is held.
func (f *flows) drop(port uint16) {
	delete(f.peers, port)
	f.n.flows.give()
}

// room takes a place in the table, if need be from peers that have been silent. table is held.
func (f *flows) room() bool {
	if f.n.flows.take() {
		return true
	}
	now := time.Now()
	for port, one := range f.peers {
		if now.Sub(one.used) > flowTime {
			f.drop(port)
		}
	}
	return f.n.flows.take()
}

// peerPort returns the gateway's port that a peer is; 0: there is none for it.
func (f *flows) peerPort(c *stdnet.UDPConn, from netip.AddrPort, guest uint16, ports map[netip.AddrPort]uint16) uint16 {
	f.table.Lock()
	defer f.table.Unlock()
	if one := f.peers[ports[from]]; one != nil && one.c == c && one.from == from {
		one.used = time.Now()
		return ports[from]
	}
	delete(ports, from)
	for who, port := range ports {
		if len(ports) < maxPeers {
			break
		}
		if one := f.peers[port]; one == nil || one.from != who || one.c != c {
			delete(ports, who) // it was dropped
		}
	}
	if !f.room() {
		return 0
	}
	for {
		if f.next++; f.next < firstPeer {
			f.next = firstPeer
		}
		if f.peers[f.next] == nil {
			break
		}
	}
	f.peers[f.next] = &peer{c: c, from: from, guest: guest, used: time.Now()}
	ports[from] = f.next
	return f.next
}

// answer brings a datagram of the guest to the peer of a forward.
func (f *flows) answer(port, from uint16, payload []byte) bool {
	f.table.Lock()
	one := f.peers[port]
	if one != nil && one.guest == from {
		one.used = time.Now()
	}
	f.table.Unlock()
	if one == nil || one.guest != from {
		return false
	}
	_, _ = one.c.WriteToUDPAddrPort(payload, one.from)
	return true
}

// addChecksum adds a packet's data to a checksum.
func addChecksum(sum uint16, p *stack.PacketBuffer) uint16 {
	return checksum.Combine(sum, p.Data().Checksum())
}
