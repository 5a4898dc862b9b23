package serial

import (
	"bytes"
	"fmt"

	"github.com/govmm/govmm/internal/charqueue"
)

// State is what of a UART travels with a migration. Input that the guest has
// not read goes with it: it was typed to the guest, not to a host. Of the
// output goes the line that the guest has not finished, if it is held
// ([UART.HoldLine]); whole lines that the backend has not taken when the state
// is saved ([UART.Drain] first) are still written by the UART that was saved
// from.
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
	// THREPending: the transmitter's interrupt is pending, or will be as soon
	// as there is room for output, which there is at the destination from the
	// start.
	THREPending bool   `cbor:"thre_pending"`
	FIFO        []byte `cbor:"fifo"`    // received, not read by the guest; at most 16 bytes
	Pending     []byte `cbor:"pending"` // waits for room in FIFO; at most 4096 bytes
	Line        []byte `cbor:"line"`    // sent by the guest, no newline yet; at most 64 KiB
}

// SaveState returns the state. The UART is not changed by it. The vCPUs and
// [UART.Serve] have stopped.
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

// LoadState replaces the state by a saved one, or changes nothing and says what
// is wrong with it. The interrupt controllers have been loaded: the level of
// the interrupt line is set anew, which they then take as no change.
func (u *UART) LoadState(s State) error {
	if s.IER&^ierMask != 0 || s.MCR&^mcrMask != 0 || s.FCR&^fcrKept != 0 || (s.FCR != 0 && s.FCR&fcrEnable == 0) {
		return fmt.Errorf("serial port state: IER %#x, FCR %#x or MCR %#x has bits that do not exist", s.IER, s.FCR, s.MCR)
	}
	depth := 1
	if s.FCR&fcrEnable != 0 {
		depth = fifoSize
	}
	if len(s.FIFO) > depth || len(s.Pending) > maxPending {
		return fmt.Errorf("serial port state: %d bytes in the FIFO and %d waiting; at most %d and %d are possible", len(s.FIFO), len(s.Pending), depth, maxPending)
	}
	if len(s.Line) > charqueue.Size || bytes.IndexByte(s.Line, '\n') >= 0 {
		return fmt.Errorf("serial port state: an unfinished line of %d bytes, at most %d without a newline are possible", len(s.Line), charqueue.Size)
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
