package net

import (
	"encoding/binary"
	"errors"

	"github.com/govmm/govmm/virtio"
)

// Control commands, section 5.1.6.5: a class, a command, its data; the device
// answers with one byte.
const (
	classMAC      = 1
	classAnnounce = 3
	classMQ       = 4
	classOffloads = 5

	macAddrSet  = 1
	announceAck = 0
	pairsSet    = 0
	offloadsSet = 0

	controlOK  = 0
	controlErr = 1
)

// errControl: a request has no room for the answer.
var errControl = errors.New("net: a control request without room for its answer")

// controller serves the control queue.
type controller struct {
	d        *Device
	features uint64
	buf      [16]byte // longer than any command
}

func (s *controller) serve(c *virtio.Chain) (uint32, error) {
	if c.WritableLen() < 1 {
		return 0, errControl
	}
	answer := byte(controlErr)
	p := s.buf[:c.ReadAt(s.buf[:], 0)]
	if len(p) >= 2 && s.command(p[0], p[1], p[2:]) {
		answer = controlOK
	}
	return uint32(c.WriteAt([]byte{answer}, 0)), nil
}

// command carries out a command and reports whether it succeeded. The data must
// have exactly the length that the command defines.
func (s *controller) command(class, command byte, data []byte) bool {
	switch {
	case class == classAnnounce && command == announceAck && len(data) == 0:
		return s.allowed(FeatureGuestAnnounce) && s.change(func(st *State) { st.Status &^= statusAnnounce })
	case class == classMAC && command == macAddrSet && len(data) == len(MAC{}):
		m := MAC(data)
		return s.allowed(FeatureCtrlMACAddr) && m.valid() && s.d.mayBe(m) && s.change(func(st *State) { st.MAC = m })
	case class == classMQ && command == pairsSet && len(data) == 2:
		n := int(binary.LittleEndian.Uint16(data))
		return s.allowed(FeatureMultiQueue) && n >= 1 && n <= len(s.d.ports) && s.d.setPairs(n) &&
			s.change(func(st *State) { st.Pairs = uint16(n) })
	case class == classOffloads && command == offloadsSet && len(data) == 8:
		v := binary.LittleEndian.Uint64(data)
		return s.allowed(FeatureCtrlGuestOffloads) && v&^(s.features&guestOffloads) == 0 && s.d.setOffloads(v) &&
			s.change(func(st *State) { st.Offloads, st.OffloadsSet = v, true })
	}
	return false
}

func (s *controller) allowed(feature uint64) bool { return s.features&feature != 0 }

// change changes the state without an interrupt, since the driver knows of the
// change. It returns true.
func (s *controller) change(f func(*State)) bool {
	s.d.config.Lock()
	defer s.d.config.Unlock()
	st := s.d.state
	f(&st)
	s.d.setState(st)
	return true
}

// setPairs attaches n ports and serves them. Ports are no longer read when they
// are detached. A failure, which is the host's, is logged.
func (d *Device) setPairs(n int) bool {
	if n < int(d.pairs.Load()) {
		d.pairs.Store(int32(n)) // before the ports of the senders are detached
	}
	for i, r := range d.receivers {
		if i >= n {
			r.setActive(false)
		}
	}
	err := d.cfg.Backend.SetPairs(n)
	for i, r := range d.receivers {
		if i < n {
			r.setActive(true)
		}
	}
	if err != nil {
		d.cfg.Log.Error("set the number of queue pairs", "device", d.cfg.Backend.Name(), "pairs", n, "err", err)
		return false
	}
	return true
}

// setOffloads tells the host what the guest accepts.
func (d *Device) setOffloads(guest uint64) bool {
	if err := d.cfg.Backend.SetOffloads(guest); err != nil {
		d.cfg.Log.Error("set the offloads", "device", d.cfg.Backend.Name(), "err", err)
		return false
	}
	for _, r := range d.receivers {
		r.guest.Store(guest)
	}
	return true
}
