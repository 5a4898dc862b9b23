package platform

import (
	"encoding/binary"
	"fmt"
	"sync"
	"time"
)

// CMOSPorts is the number of CMOS's ports: index and data.
const CMOSPorts = 2

// CMOS registers: those of the clock (Motorola MC146818A), and those in which PCs
// have the size of the memory.
const (
	rtcSecond, rtcMinute, rtcHour = 0x00, 0x02, 0x04 // between them: the alarm's
	rtcWeekday, rtcDay            = 0x06, 0x07
	rtcMonth, rtcYear             = 0x08, 0x09
	rtcA, rtcB, rtcC, rtcD        = 0x0a, 0x0b, 0x0c, 0x0d
	rtcCentury                    = 0x32

	rtcUpdating   = 1 << 7 // A: an update is in progress
	rtcRateReset  = 0x26   // A: 32768 Hz, 1024 interrupts a second
	rtcHold       = 1 << 7 // B: the clock stands still while its registers are set
	rtcBinary     = 1 << 2 // B: numbers are binary, not BCD
	rtc24Hours    = 1 << 1 // B
	rtcAfternoon  = 1 << 7 // in a 12-hour hour
	rtcValid      = 1 << 7 // D: the battery is good
	cmosBaseKiB   = 0x15   // 16 bits: memory below 640 KiB, in KiB
	cmosExtKiB    = 0x17   // 16 bits: memory from 1 MiB, in KiB, to 64 MiB; also at 0x30
	cmosExtKiB2   = 0x30
	cmosExt64KiB  = 0x34 // 16 bits: memory from 16 MiB to 4 GiB, in 64 KiB
	cmosHigh64KiB = 0x5b // 24 bits: memory from 4 GiB, in 64 KiB
)

// CMOSConfig determines the content of CMOS after power on.
type CMOSConfig struct {
	Now func() time.Time // nil: time.Now
	// Low and High are the guest's RAM in bytes below and above 4 GiB.
	Low, High uint64
}

// CMOS is a PC's non-volatile memory of 128 bytes with its clock, which runs in UTC:
// time and date, BCD or binary, 12 or 24 hours. The guest can set alarms and
// interrupts of the clock, but they do not occur.
type CMOS struct {
	now func() time.Time

	mu    sync.Mutex // guards state
	state CMOSState
}

// CMOSState is CMOS's state that a migration sends.
type CMOSState struct {
	Index  byte      `cbor:"index"`
	Memory [128]byte `cbor:"memory"`
	// Offset is the guest's clock minus the host's, in seconds: a guest may
	// set its clock.
	Offset int64 `cbor:"offset"`
}

// NewCMOS returns CMOS with the host's time.
func NewCMOS(cfg CMOSConfig) *CMOS {
	d := &CMOS{now: cfg.Now}
	if d.now == nil {
		d.now = time.Now
	}
	const kib, mib = 1 << 10, 1 << 20
	le := binary.LittleEndian
	m := &d.state.Memory
	m[rtcA], m[rtcB], m[rtcD] = rtcRateReset, rtc24Hours, rtcValid
	le.PutUint16(m[cmosBaseKiB:], 640)
	ext := uint16(min(above(cfg.Low, mib)/kib, 0xfc00))
	le.PutUint16(m[cmosExtKiB:], ext)
	le.PutUint16(m[cmosExtKiB2:], ext)
	le.PutUint16(m[cmosExt64KiB:], uint16(min(above(cfg.Low, 16*mib)/(64*kib), 0xffff)))
	high := min(cfg.High/(64*kib), 0xffffff)
	m[cmosHigh64KiB], m[cmosHigh64KiB+1], m[cmosHigh64KiB+2] = byte(high), byte(high>>8), byte(high>>16)
	return d
}

// above returns the part of size above a limit.
func above(size, limit uint64) uint64 {
	if size < limit {
		return 0
	}
	return size - limit
}

// Read reads the data port. The index port reads as all ones.
func (d *CMOS) Read(off uint64, p []byte) {
	for i := range p {
		p[i] = 0xff
		if off+uint64(i) == 1 {
			p[i] = d.get()
		}
	}
}

// Write selects a register, or writes it. The index's top bit, which masks NMIs on
// a PC, has no effect.
func (d *CMOS) Write(off uint64, p []byte) {
	for i, v := range p {
		switch off + uint64(i) {
		case 0:
			d.mu.Lock()
			d.state.Index = v & 0x7f
			d.mu.Unlock()
		case 1:
			d.set(v)
		}
	}
}

func (d *CMOS) get() byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	at := d.state.Index
	if isTime(at) && d.state.Memory[rtcB]&rtcHold == 0 {
		d.tick()
	}
	return d.state.Memory[at]
}

func (d *CMOS) set(v byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	m := &d.state.Memory
	switch at := d.state.Index; {
	case at == rtcA:
		m[at] = v &^ rtcUpdating
	case at == rtcB:
		if m[at]&rtcHold == 0 {
			d.tick() // registers that the guest does not set keep the current time
		}
		held := m[at]&rtcHold != 0
		m[at] = v
		if held && v&rtcHold == 0 {
			d.adopt()
		}
	case at == rtcC || at == rtcD: // read only
	case isTime(at):
		held := m[rtcB]&rtcHold != 0
		if !held {
			d.tick()
		}
		m[at] = v
		if !held {
			d.adopt()
		}
	default:
		m[at] = v
	}
}

// isTime returns whether a register belongs to the time or date.
func isTime(at byte) bool {
	switch at {
	case rtcSecond, rtcMinute, rtcHour, rtcWeekday, rtcDay, rtcMonth, rtcYear, rtcCentury:
		return true
	}
	return false
}

// tick writes the time into the registers. The caller holds mu.
func (d *CMOS) tick() {
	m := &d.state.Memory
	t := time.Unix(d.now().Unix()+d.state.Offset, 0).UTC()
	put := func(at byte, v int) { m[at] = d.encode(v) }
	put(rtcSecond, t.Second())
	put(rtcMinute, t.Minute())
	put(rtcWeekday, int(t.Weekday())+1)
	put(rtcDay, t.Day())
	put(rtcMonth, int(t.Month()))
	put(rtcYear, t.Year()%100)
	put(rtcCentury, t.Year()/100)
	hour := t.Hour()
	if m[rtcB]&rtc24Hours != 0 {
		put(rtcHour, hour)
		return
	}
	put(rtcHour, (hour+11)%12+1)
	if hour >= 12 {
		m[rtcHour] |= rtcAfternoon
	}
}

// adopt sets the guest's time to that in the registers. A date that does not exist
// is normalised: the 31st of April is the 1st of May. The caller holds mu.
func (d *CMOS) adopt() {
	m := &d.state.Memory
	get := func(at byte) int { return d.decode(m[at]) }
	hour := 0
	if m[rtcB]&rtc24Hours != 0 {
		hour = get(rtcHour)
	} else {
		hour = d.decode(m[rtcHour]&^rtcAfternoon) % 12
		if m[rtcHour]&rtcAfternoon != 0 {
			hour += 12
		}
	}
	t := time.Date(get(rtcCentury)*100+get(rtcYear), time.Month(get(rtcMonth)), get(rtcDay),
		hour, get(rtcMinute), get(rtcSecond), 0, time.UTC)
	d.state.Offset = t.Unix() - d.now().Unix()
}

// encode and decode convert the registers' number format.
func (d *CMOS) encode(v int) byte {
	if d.state.Memory[rtcB]&rtcBinary != 0 {
		return byte(v)
	}
	return byte(v/10<<4 | v%10)
}

func (d *CMOS) decode(v byte) int {
	if d.state.Memory[rtcB]&rtcBinary != 0 {
		return int(v)
	}
	return int(v>>4)*10 + int(v&0xf)
}

// SaveState returns the state.
func (d *CMOS) SaveState() CMOSState {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state
}

// LoadState loads a saved state. The clock then follows this host's clock.
func (d *CMOS) LoadState(s CMOSState) error {
	const centuries = 300 * 366 * 24 * 60 * 60 * 100 // beyond any date of 4 digits and overflows
	if s.Index > 0x7f || s.Offset > centuries || s.Offset < -centuries {
		return fmt.Errorf("CMOS state: index %#x or clock offset of %d s is out of range", s.Index, s.Offset)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state = s
	return nil
}
