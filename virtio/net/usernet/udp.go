package usernet

import (
	stdnet "net"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// flowTime is how long a flow of datagrams is kept that nobody uses.
	flowTime = 90 * time.Second
	// queryTime is how long a name server may take, before the next one is asked.
	queryTime = 2 * time.Second
	// maxDatagram is the longest payload of a datagram.
	maxDatagram = 65507
)

// flows are sockets of the host for ports of the guest: each port has one, which all the
// peers that it has sent to may answer. So does a peer of a forward: the guest sees it as a
// port of the gateway.
type flows struct {
	n *Network

	table  sync.Mutex // guards both
	byPort map[uint16]*flow
	peers  map[uint16]*peer // by the gateway's port
	next   uint16
}

// flow is a port of the guest.
type flow struct {
	c    *stdnet.UDPConn
	port uint16

	sent sync.Mutex                        // guards to
	to   map[netip.AddrPort]netip.AddrPort // the guest's name of those that it has sent to
}

// maxPeers is how many peers of a flow may answer.
const maxPeers = 256

func (f *flows) init(n *Network) {
	f.n, f.byPort, f.peers, f.next = n, map[uint16]*flow{}, map[uint16]*peer{}, firstPeer
}

// datagram takes a datagram of the guest. It implements the stack's handler.
func (n *Network) datagram(id stack.TransportEndpointID, p *stack.PacketBuffer) bool {
	to := addrPort(id.LocalAddress, id.LocalPort)
	payload, h := p.Data().AsRange().ToSlice(), header.UDP(p.TransportHeader().Slice())
	size := int(h.Length()) - header.UDPMinimumSize
	if size < 0 || size > len(payload) {
		return true
	}
	payload = payload[:size]
	if to.Addr() == gatewayIP {
		if to.Port() == dnsPort {
			n.query(id.RemotePort, payload)
			return true
		}
		return n.udp.answer(to.Port(), id.RemotePort, payload)
	}
	host, ok := n.reach(to)
	if !ok {
		return false
	}
	if f := n.udp.flow(id.RemotePort); f != nil {
		f.send(to, host, payload)
	}
	return true
}

// flow returns the socket of a port of the guest, nil if there cannot be one.
func (f *flows) flow(port uint16) *flow {
	f.table.Lock()
	defer f.table.Unlock()
	if one := f.byPort[port]; one != nil {
		return one
	}
	if !f.room() {
		return nil
	}
	c, err := stdnet.ListenUDP("udp4", nil)
	if err != nil {
		f.n.flows.give()
		return nil
	}
	one := &flow{c: c, port: port, to: map[netip.AddrPort]netip.AddrPort{}}
	f.byPort[port] = one
	go f.serve(one)
	return one
}

// send sends a datagram of the guest, which calls its destination to.
func (w *flow) send(to, host netip.AddrPort, payload []byte) {
	w.sent.Lock()
	if len(w.to) >= maxPeers {
		clear(w.to) // those that answer again are sent to again
	}
	w.to[host] = to
	w.sent.Unlock()
	_ = w.c.SetReadDeadline(time.Now().Add(flowTime))
	_, _ = w.c.WriteToUDPAddrPort(payload, host) // what cannot be sent is lost, as on any network
}

// serve brings answers to the guest until nobody uses the flow any more.
func (f *flows) serve(w *flow) {
	p := make([]byte, maxDatagram)
	for {
		n, from, err := w.c.ReadFromUDPAddrPort(p)
		if err != nil { // nobody has used it for a while
			break
		}
		w.sent.Lock()
		as, ok := w.to[netip.AddrPortFrom(from.Addr().Unmap(), from.Port())]
		w.sent.Unlock()
		if !ok {
			continue // nobody that the guest has sent to
		}
		_ = w.c.SetReadDeadline(time.Now().Add(flowTime))
		f.n.sendUDP(as, w.port, p[:n])
	}
	f.table.Lock()
	delete(f.byPort, w.port)
	f.table.Unlock()
	_ = w.c.Close()
	f.n.flows.give()
}

// sendUDP sends a datagram to a port of the guest. One that is longer than the link's MTU goes in
// fragments.
func (n *Network) sendUDP(from netip.AddrPort, port uint16, payload []byte) {
	source, guest := full(from.Addr(), from.Port()), full(guestIP, port)
	r, err := n.stack.FindRoute(nic, source.Addr, guest.Addr, ipv4.ProtocolNumber, false)
	if err != nil {
		return
	}
	defer r.Release()
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: header.UDPMinimumSize + int(r.MaxHeaderLength()), Payload: buffer.MakeWithData(payload)})
	defer p.DecRef()
	p.TransportProtocolNumber = header.UDPProtocolNumber
	u := header.UDP(p.TransportHeader().Push(header.UDPMinimumSize))
	u.Encode(&header.UDPFields{SrcPort: source.Port, DstPort: port, Length: uint16(p.Size())})
	sum := r.PseudoHeaderChecksum(header.UDPProtocolNumber, uint16(p.Size()))
	u.SetChecksum(^u.CalculateChecksum(addChecksum(sum, p)))
	_ = r.WritePacket(stack.NetworkHeaderParams{Protocol: header.UDPProtocolNumber, TTL: 64}, p) // lost, as on any network
}

// query asks the host's name servers, one after the other, what the guest has asked the
// gateway. The message is not looked at.
func (n *Network) query(port uint16, question []byte) {
	if len(n.cfg.Servers) == 0 || !n.queries.take() {
		return
	}
	go func() {
		defer n.queries.give()
		for _, server := range n.cfg.Servers {
			if answer := ask(server, question); answer != nil {
				n.sendUDP(netip.AddrPortFrom(gatewayIP, dnsPort), port, answer)
				return
			}
		}
	}()
}

// ask asks one name server; nil: it does not answer.
func ask(server netip.AddrPort, question []byte) []byte {
	c, err := stdnet.DialUDP("udp", nil, stdnet.UDPAddrFromAddrPort(server))
	if err != nil {
		return nil
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(queryTime))
	if _, err := c.Write(question); err != nil {
		return nil
	}
	p := make([]byte, maxDatagram)
	for {
		n, err := c.Read(p)
		if err != nil {
			return nil
		}
		if n >= 2 && len(question) >= 2 && [2]byte(p) == [2]byte(question) { // the message's id
			return p[:n]
		}
	}
}
