package net

import (
	"errors"

	"github.com/govmm/govmm/virtio"
)

// sender serves a transmit queue, section 5.1.6.2.
type sender struct {
	d        *Device
	pair     int
	port     Port
	features uint64
	maxPlain int
	buf      [HeaderBytes + maxFrame + 1]byte
}

func newSender(d *Device, pair int, features uint64) *sender {
	s := &sender{d: d, pair: pair, port: d.ports[pair], features: features, maxPlain: d.maxPlain(features)}
	return s
}

// maxPlain is the longest frame that need not be segmented: with VIRTIO_NET_F_MTU that
// of the MTU, with two VLAN tags (section 5.1.4).
func (d *Device) maxPlain(features uint64) int {
	if features&FeatureMTU != 0 {
		return int(d.cfg.MTU) + etherHeader + 8
	}
	return maxFrame
}

// serve sends a frame, or drops it. The guest is not told, as on any network.
func (s *sender) serve(c *virtio.Chain) (uint32, error) {
	p := s.buf[:c.ReadAt(s.buf[:], 0)]
	n := &s.d.counters
	if len(p) == len(s.buf) || !s.d.linkUp.Load() || s.pair >= int(s.d.pairs.Load()) || !checkSent(p, s.features, s.maxPlain) {
		n.txDropped.Add(1)
		return 0, nil
	}
	if s.d.guard != nil && !s.d.guard.owns(p) {
		n.txForeign.Add(1)
		return 0, nil
	}
	if err := s.port.Write(p); err != nil {
		n.txDropped.Add(1)
		// An error of a port that is being detached is not the backend's end.
		if !errors.Is(err, ErrDropped) && s.pair < int(s.d.pairs.Load()) {
			s.d.lost(err)
		}
		return 0, nil
	}
	n.txFrames.Add(1)
	n.txBytes.Add(uint64(len(p) - HeaderBytes))
	return 0, nil
}
