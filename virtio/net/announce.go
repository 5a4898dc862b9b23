package net

import (
	"encoding/binary"
	"time"
)

// announceAt is when a guest that has arrived is announced: at once, and again
// in case the first frames are lost.
var announceAt = []time.Duration{0, 50 * time.Millisecond, 200 * time.Millisecond, 450 * time.Millisecond, 800 * time.Millisecond}

// announcement sends RARP requests in a goroutine.
type announcement struct {
	stop, ended chan struct{}
}

// Announce tells the network where the guest is after a migration: by RARP
// requests, from which switches and bridges learn its port, and by asking the
// guest's driver to announce its IP addresses, if the driver supports that. It
// returns at once. The device is active and not paused. Announce is not called at
// the same time as another method of the device.
func (d *Device) Announce() {
	d.config.Lock()
	active, ask := d.notifier != nil, d.features&FeatureGuestAnnounce != 0
	d.config.Unlock()
	if !active {
		return
	}
	if ask {
		d.changeConfig(func(s *State) { s.Status |= statusAnnounce })
	}
	d.endAnnouncement()
	a := &announcement{make(chan struct{}), make(chan struct{})}
	d.announcement = a
	go func() {
		defer close(a.ended)
		begin := time.Now()
		for _, at := range announceAt {
			select {
			case <-time.After(time.Until(begin.Add(at))):
			case <-a.stop:
				return
			}
			frame := rarp(d.MAC())
			// A dropped frame is sent again. The receivers and senders find out
			// when the backend is gone.
			_ = d.ports[0].Write(frame[:])
			flush(d.ports[0])
		}
	}()
}

// reconnected sets the link up, whose other end knows nothing of the guest yet.
func (d *Device) reconnected() {
	d.changeConfig(func(s *State) {
		d.hostUp = true
		s.Status = d.withLink(s.Status)
		if d.features&FeatureGuestAnnounce != 0 {
			s.Status |= statusAnnounce
		}
	})
	frame := rarp(d.MAC())
	_ = d.ports[0].Write(frame[:])
	flush(d.ports[0])
}

func (d *Device) endAnnouncement() {
	if d.announcement != nil {
		close(d.announcement.stop)
		<-d.announcement.ended
		d.announcement = nil
	}
}

// rarp is a broadcast that asks for m's IP address (RFC 903), with an empty
// header, of Ethernet's minimum length. No answer is expected.
func rarp(m MAC) [HeaderBytes + 60]byte {
	var b [HeaderBytes + 60]byte
	p := b[HeaderBytes:]
	for i := range 6 {
		p[i] = 0xff
	}
	copy(p[6:], m[:])
	binary.BigEndian.PutUint16(p[12:], 0x8035) // RARP
	binary.BigEndian.PutUint16(p[14:], 1)      // Ethernet
	binary.BigEndian.PutUint16(p[16:], 0x0800) // IPv4
	p[18], p[19] = 6, 4
	binary.BigEndian.PutUint16(p[20:], 3) // request reverse
	copy(p[22:], m[:])
	copy(p[32:], m[:])
	return b
}
