package serial

import (
	"bytes"
	"fmt"

	"github.com/govmm/govmm/internal/charqueue"
)

// State is what travels with a migration: the registers, the input that the guest
// has not read, and of the output the line that the guest has not ended, if it is
// held ([UART.HoldLine]). The UART at the source still writes whole lines
// ([UART.Drain]).
type State struct {
	IER     byte `cbor:"ier"`
	FCR     byte `cbor:"fcr"`
	LCR     byte `cbor:"lcr"`
	MCR     byte `cbor:"mcr"`
	SCR     byte `cbor:"scr"`
	DLL     byte `cbor:"dll"`
	DLM     byte `cbor:"dlm"`
	MSR     byte `cbor:"msr"`
	Overrun bool `cbor:"overrun"`
	// THREPending: the transmitter's interrupt is pending, or will be when there
	// is room for output, which the destination has from the start.
	THREPending bool   `cbor:"thre_pending"`
	FIFO        []byte `cbor:"fifo"`    // received, not read by the guest; at most 16 bytes
	Pending     []byte `cbor:"pending"` // waits for room in FIFO; at most 4096 bytes
	Line        []byte `cbor:"line"`    // sent by the guest, no newline yet; at most 64 KiB
}

// SaveState returns the state, and changes nothing. The vCPUs and [UART.Serve] have
// stopped.
func (u *UART) SaveState() State {
	u.regs.Lock()
	defer u.regs.Unlock()
	return State{
		IER: u.ier, FCR: u.fcr, LCR: u.lcr, MCR: u.mcr, SCR: u.scr,
		DLL: u.dll, DLM: u.dlm, MSR: u.msr,
		Overrun:     u.overrun,
		THREPending: u.thri || u.full,
		FIFO:        append([]byte(nil), u.fifo...),
		Pending:     append([]byte(nil), u.pending...),
		Line:        u.out.Line(),
	}
}

// LoadState loads a saved state. After an error nothing has changed. The interrupt
// controllers have been loaded, so that setting the level of the interrupt line
// makes no edge.
func (u *UART) LoadState(s State) error {
	if s.IER&^ierMask != 0 || s.MCR&^mcrMask != 0 || s.FCR&^fcrKept != 0 || (s.FCR != 0 && s.FCR&fcrEnable == 0) {
		return fmt.Errorf("serial port state: IER %#x, FCR %#x or MCR %#x has undefined bits", s.IER, s.FCR, s.MCR)
	}
	depth := 1
	if s.FCR&fcrEnable != 0 {
		depth = fifoSize
	}
	if len(s.FIFO) > depth || len(s.Pending) > maxPending {
		return fmt.Errorf("serial port state: expected at most %d bytes in the FIFO and %d pending, got %d and %d", depth, maxPending, len(s.FIFO), len(s.Pending))
	}
	if len(s.Line) > charqueue.Size || bytes.IndexByte(s.Line, '\n') >= 0 {
		return fmt.Errorf("serial port state: an unfinished line must have no newline and at most %d bytes, got %d", charqueue.Size, len(s.Line))
	}
	u.regs.Lock()
	defer u.regs.Unlock()
	u.out.Put(s.Line)
	u.ier, u.fcr, u.lcr, u.mcr, u.scr = s.IER, s.FCR, s.LCR, s.MCR, s.SCR
	u.dll, u.dlm, u.msr = s.DLL, s.DLM, s.MSR
	u.overrun = s.Overrun
	u.full = u.out.Room() < fifoSize
	u.thri = s.THREPending && !u.full
	u.fifo = append(u.fifo[:0], s.FIFO...)
	u.pending = append(u.pending[:0], s.Pending...)
	u.refill()
	u.line = u.interrupt() != iirNone
	u.irq(u.line)
	return nil
}
