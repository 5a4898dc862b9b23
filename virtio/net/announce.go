package net

import (
	"encoding/binary"
	"time"
)

// announceAt is when a guest that has arrived is announced: at once, and again
// in case that was lost, or the way to the switch was not open yet.
var announceAt = []time.Duration{0, 50 * time.Millisecond, 200 * time.Millisecond, 450 * time.Millisecond, 800 * time.Millisecond}

// announcement sends RARP requests in a goroutine.
type announcement struct {
	stop, ended chan struct{}
}

// Announce tells the network that the guest is here now, after a migration: by
// RARP requests, from which switches and bridges learn its port, and by asking
// the guest's driver to announce its IP addresses, if it can. It returns at
// once. The device has been activated and is not paused; it is called one at a
// time with the device's other methods.
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
			// What is dropped is sent again; a backend that has gone is told of
			// by those that serve it.
			_ = d.ports[0].Write(frame[:])
		}
	}()
}

func (d *Device) endAnnouncement() {
	if d.announcement != nil {
		close(d.announcement.stop)
		<-d.announcement.ended
		d.announcement = nil
	}
}

// rarp is a broadcast that asks for m's IP address (RFC 903), with an empty
// header, as long as Ethernet wants it. Nobody answers.
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
