package usernet

import (
	"encoding/binary"
	"errors"
	"sync/atomic"

	"github.com/govmm/govmm/internal/netproc"
	"github.com/govmm/govmm/virtio/net"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	headerBytes = net.HeaderBytes
	etherHeader = header.EthernetMinimumSize
	// maxFrame is the longest frame without its header, as of virtio/net.
	maxFrame = 65535 + etherHeader + 8
)

func setNonblock(fd int) error { return unix.SetNonblock(fd, true) }

// endpoint is the stack's end of the stream of frames. It implements [stack.LinkEndpoint]
// and [stack.GSOEndpoint].
type endpoint struct {
	mtu uint32
	mac net.MAC
	in  *netproc.Reader
	out *netproc.Writer
	// accept reports whether a frame is for the stack, after it has done with it what is
	// to be done otherwise.
	accept func(frame []byte) bool
	apart  bool          // segments are delivered as they come
	guest  atomic.Uint64 // the Guest features of virtio-net that the other end accepts

	dispatcher stack.NetworkDispatcher
	ready      atomic.Bool // dispatcher is set
}

// MTU implements [stack.NetworkLinkEndpoint].
func (e *endpoint) MTU() uint32 { return e.mtu }

// SetMTU implements [stack.NetworkLinkEndpoint].
func (e *endpoint) SetMTU(uint32) {}

// MaxHeaderLength implements [stack.NetworkLinkEndpoint].
func (e *endpoint) MaxHeaderLength() uint16 { return etherHeader }

// LinkAddress implements [stack.NetworkLinkEndpoint].
func (e *endpoint) LinkAddress() tcpip.LinkAddress { return tcpip.LinkAddress(e.mac[:]) }

// SetLinkAddress implements [stack.NetworkLinkEndpoint].
func (e *endpoint) SetLinkAddress(tcpip.LinkAddress) {}

// Capabilities implements [stack.NetworkLinkEndpoint]. Nothing is lost or changed on a local
// socket, so checksums of the guest are not looked at.
func (e *endpoint) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityResolutionRequired | stack.CapabilityRXChecksumOffload
}

// Attach implements [stack.NetworkLinkEndpoint].
func (e *endpoint) Attach(d stack.NetworkDispatcher) {
	e.dispatcher = d
	e.ready.Store(d != nil)
}

// IsAttached implements [stack.NetworkLinkEndpoint].
func (e *endpoint) IsAttached() bool { return e.ready.Load() }

// Wait implements [stack.NetworkLinkEndpoint].
func (e *endpoint) Wait() {}

// Close implements [stack.NetworkLinkEndpoint].
func (e *endpoint) Close() {}

// SetOnCloseAction implements [stack.NetworkLinkEndpoint].
func (e *endpoint) SetOnCloseAction(func()) {}

// ARPHardwareType implements [stack.NetworkLinkEndpoint].
func (e *endpoint) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareEther }

// AddHeader implements [stack.NetworkLinkEndpoint].
func (e *endpoint) AddHeader(p *stack.PacketBuffer) {
	header.Ethernet(p.LinkHeader().Push(etherHeader)).Encode(&header.EthernetFields{
		SrcAddr: e.LinkAddress(), DstAddr: p.EgressRoute.RemoteLinkAddress, Type: p.NetworkProtocolNumber})
}

// ParseHeader implements [stack.NetworkLinkEndpoint].
func (e *endpoint) ParseHeader(p *stack.PacketBuffer) bool {
	_, ok := p.LinkHeader().Consume(etherHeader)
	return ok
}

// GSOMaxSize implements [stack.GSOEndpoint].
func (e *endpoint) GSOMaxSize() uint32 { return 65535 }

// SupportedGSO implements [stack.GSOEndpoint]: segments are cut by the guest, or on the way to
// it if it does not.
func (e *endpoint) SupportedGSO() stack.SupportedGSO { return stack.HostGSOSupported }

// run moves frames into the stack until the stream ends.
func (e *endpoint) run() error {
	m := merger{deliver: e.deliver}
	add := m.add
	if e.apart {
		add = e.deliver
	}
	for {
		frame, err := e.in.Next()
		if err != nil {
			return err
		}
		if frame == nil {
			m.flush()
			_ = e.out.Flush() // an error is the reader's, too
			if err := e.in.Fill(nil); err != nil {
				return err
			}
			continue
		}
		if e.ready.Load() {
			each(frame[:headerBytes], frame[headerBytes:], add)
		}
	}
}

// deliver gives a frame to the stack.
func (e *endpoint) deliver(frame []byte) {
	if !e.accept(frame) {
		return
	}
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame)})
	if e.ParseHeader(p) {
		p.RXChecksumValidated = true
		e.dispatcher.DeliverNetworkPacket(tcpip.NetworkProtocolNumber(binary.BigEndian.Uint16(frame[12:])), p)
	}
	p.DecRef()
}

// WritePackets implements [stack.LinkWriter].
func (e *endpoint) WritePackets(list stack.PacketBufferList) (int, tcpip.Error) {
	sent := 0
	for _, p := range list.AsSlice() {
		if !e.write(p) {
			break
		}
		sent++
	}
	if err := e.out.Flush(); err != nil && sent == 0 {
		return 0, &tcpip.ErrAborted{}
	}
	if sent == 0 && list.Len() > 0 {
		return 0, &tcpip.ErrNoBufferSpace{}
	}
	return sent, nil
}

// write sends a packet as one frame, or as several if the guest does not cut it.
func (e *endpoint) write(p *stack.PacketBuffer) bool {
	var h [headerBytes]byte
	g, guest := p.GSOOptions, e.guest.Load()
	parts := p.AsSlices()
	if g.Type != stack.GSONone && g.NeedsCsum {
		start := etherHeader + g.L3HdrLen
		long := p.Data().Size() > int(g.MSS)
		if guest&net.FeatureGuestCsum == 0 || long && guest&net.FeatureGuestTSO4 == 0 {
			return e.writeCut(p, int(start), int(g.MSS))
		}
		h[0] = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM
		binary.LittleEndian.PutUint16(h[6:], start)
		binary.LittleEndian.PutUint16(h[8:], g.CsumOffset)
		if long {
			h[1] = 1 // VIRTIO_NET_HDR_GSO_TCPV4
			binary.LittleEndian.PutUint16(h[2:], start+uint16(len(p.TransportHeader().Slice())))
			binary.LittleEndian.PutUint16(h[4:], g.MSS)
		}
	}
	var few [8][]byte
	return e.out.Write(append(append(few[:0], h[:]), parts...)...) == nil
}

// writeCut sends a packet of TCP cut into segments, with their checksums.
func (e *endpoint) writeCut(p *stack.PacketBuffer, start, size int) bool {
	v := p.ToView()
	defer v.Release()
	var h [headerBytes]byte
	ok := true
	cutTCP(v.AsSlice(), start, size, func(frame []byte) {
		ok = ok && e.out.Write(h[:], frame) == nil
	})
	return ok
}

// send sends a frame that was not made by the stack.
func (e *endpoint) send(frame []byte) {
	var h [headerBytes]byte
	if err := e.out.Write(h[:], frame); err == nil || errors.Is(err, netproc.ErrFull) {
		_ = e.out.Flush() // an error is the reader's, too
	}
}
