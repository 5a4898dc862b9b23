// Package serial is the guest's serial port: a 16550A UART and its backends on
// the host.
//
// Neither direction loses a byte, and neither makes a vCPU wait. A goroutine
// writes the output from a queue; while the queue is full, the transmitter is busy
// (LSR.THRE is clear). Input goes to the receive FIFO as the guest makes room in
// it.
//
//	u := serial.New(irq, backend)
//	go u.Serve(ctx, backend)      // input, until ctx ends
//	u.WritePort(off, b)           // a vCPU's OUT to port 0x3f8+off
//	...
//	u.Drain(ctx); backend.Close(); u.Close()
package serial

import (
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/govmm/govmm/internal/charqueue"
)

// Registers by their offset from the port's base (National Semiconductor
// PC16550D data sheet, section 8). Offsets 0 and 1 are the divisor latch while
// LCR.DLAB is set.
const (
	regData = 0 // RBR when read, THR when written; DLL
	regIER  = 1 // interrupt enable; DLM
	regIIR  = 2 // interrupt identification when read, FCR when written
	regLCR  = 3 // line control
	regMCR  = 4 // modem control
	regLSR  = 5 // line status
	regMSR  = 6 // modem status
	regSCR  = 7 // scratch
)

// Bits of the registers.
const (
	ierRX     = 0x01 // received data, and time-out
	ierTHRE   = 0x02 // transmitter holding register empty
	ierLine   = 0x04 // receiver line status
	ierModem  = 0x08 // modem status
	ierMask   = 0x0f
	iirNone   = 0x01
	iirModem  = 0x00
	iirTHRE   = 0x02
	iirRX     = 0x04
	iirLine   = 0x06
	iirTime   = 0x0c // data in the FIFO below the trigger level
	iirFIFO   = 0xc0 // the FIFOs are on, and work: it is a 16550A
	fcrEnable = 0x01
	fcrRXOff  = 0x02 // clear the receive FIFO
	fcrKept   = 0xc9 // enable, DMA mode, trigger level
	lcrDLAB   = 0x80
	mcrDTR    = 0x01
	mcrRTS    = 0x02
	mcrOut1   = 0x04
	mcrOut2   = 0x08
	mcrLoop   = 0x10
	mcrMask   = 0x1f
	lsrDR     = 0x01 // data ready
	lsrOE     = 0x02 // overrun
	lsrTHRE   = 0x20 // the transmitter takes at least fifoSize bytes
	lsrTEMT   = 0x40
	msrCTS    = 0x10
	msrDSR    = 0x20
	msrRI     = 0x40
	msrDCD    = 0x80
	msrLines  = 0xf0
	msrTERI   = 0x04 // RI went away
)

const (
	fifoSize = 16
	// maxPending is how much input may wait for room in the receive FIFO.
	maxPending = charqueue.MaxInput
	// divisor9600 is the value that firmware leaves in the divisor latch:
	// 115200/9600.
	divisor9600 = 12
)

// triggers are the receive FIFO's trigger levels by FCR bits 6 and 7.
var triggers = [4]int{1, 4, 8, 14}

// UART is a 16550A. It transmits and receives without delay: the guest can read the
// divisor and the frame format that it has set, which have no other effect. OUT2
// does not gate the interrupt. The character time-out comes at once.
type UART struct {
	irq func(level bool)
	out *charqueue.Output

	// room has a value when pending input has become shorter.
	room chan struct{}

	// regs guards all below. It is held while irq is called, so that levels
	// reach the interrupt controller in order; irq must not call the UART.
	regs                    sync.Mutex
	ier, fcr, lcr, mcr, scr byte
	dll, dlm                byte
	overrun                 bool   // LSR.OE
	msr                     byte   // lines and their changes
	thri                    bool   // the THRE interrupt is pending
	full                    bool   // the output queue has no room for a FIFO's worth
	fifo                    []byte // received, not read
	pending                 []byte // input that waits for room in fifo
	line                    bool   // level of the interrupt line
}

// New returns a UART in its state after power-on. It calls irq when the level of
// its interrupt line changes; irq must not call the UART. A goroutine of the UART
// writes the guest's output to out. Close returns the first error of out; bytes
// that out does not take are dropped.
func New(irq func(level bool), out io.Writer) *UART {
	u := &UART{
		irq:     irq,
		room:    make(chan struct{}, 1),
		fifo:    make([]byte, 0, fifoSize),
		pending: make([]byte, 0, maxPending),
	}
	u.powerOn()
	u.out = charqueue.NewOutput(out, fifoSize, u.transmitterReady)
	return u
}

// powerOn sets the registers to their values after power-on. regs is held, or the
// UART is new.
func (u *UART) powerOn() {
	u.ier, u.fcr, u.lcr, u.mcr, u.scr = 0, 0, 0, 0, 0
	u.dll, u.dlm = divisor9600, 0
	u.overrun, u.thri = false, false
	u.msr = msrDCD | msrDSR | msrCTS
	u.fifo = u.fifo[:0]
}

// Reset sets the registers to their values after power-on, for a reset of the
// machine. Queued output and input stay: they belong to the other end.
func (u *UART) Reset() {
	u.regs.Lock()
	defer u.regs.Unlock()
	u.powerOn()
	u.refill()
	u.update()
}

// ReadPort is the guest's read of one byte at offset off (0 to 7) from the
// port's base.
func (u *UART) ReadPort(off uint8) byte {
	u.regs.Lock()
	defer u.regs.Unlock()
	switch off {
	case regData:
		if u.lcr&lcrDLAB != 0 {
			return u.dll
		}
		return u.receive()
	case regIER:
		if u.lcr&lcrDLAB != 0 {
			return u.dlm
		}
		return u.ier
	case regIIR:
		id := u.interrupt()
		if id == iirTHRE {
			u.thri = false
			u.update()
		}
		if u.fcr&fcrEnable != 0 {
			id |= iirFIFO
		}
		return id
	case regLCR:
		return u.lcr
	case regMCR:
		return u.mcr
	case regLSR:
		status := u.lineStatus()
		u.overrun = false
		u.update()
		return status
	case regMSR:
		status := u.msr
		u.msr &= msrLines
		u.update()
		return status
	case regSCR:
		return u.scr
	}
	return 0xff
}

// WritePort is the guest's write of one byte at offset off (0 to 7) from the
// port's base. It never waits for the backend.
func (u *UART) WritePort(off uint8, b byte) {
	u.regs.Lock()
	defer u.regs.Unlock()
	switch off {
	case regData:
		if u.lcr&lcrDLAB != 0 {
			u.dll = b
			return
		}
		u.transmit(b)
	case regIER:
		if u.lcr&lcrDLAB != 0 {
			u.dlm = b
			return
		}
		// Enabling the interrupt of an empty transmitter raises it.
		if b&^u.ier&ierTHRE != 0 && !u.full {
			u.thri = true
		}
		u.ier = b & ierMask
	case regIIR:
		u.writeFCR(b)
	case regLCR:
		u.lcr = b
	case regMCR:
		u.writeMCR(b & mcrMask)
	case regSCR:
		u.scr = b
	}
	u.update()
}

// receive takes a byte from the receive FIFO.
func (u *UART) receive() byte {
	if len(u.fifo) == 0 {
		return 0
	}
	b := u.fifo[0]
	u.fifo = u.fifo[:copy(u.fifo, u.fifo[1:])]
	u.refill()
	u.update()
	return b
}

// transmit sends a byte: to the backend, or back in loopback.
func (u *UART) transmit(b byte) {
	// The holding register is full for an instant: an edge-triggered interrupt
	// controller must see the line go down, even if the guest answers the
	// interrupt by the next byte without reading IIR.
	u.thri = false
	u.update()
	if u.mcr&mcrLoop != 0 {
		switch {
		case len(u.fifo) < u.depth():
			u.fifo = append(u.fifo, b)
		case u.fcr&fcrEnable != 0:
			u.overrun = true // the FIFO stays, the new byte is lost
		default:
			u.overrun = true
			u.fifo[0] = b
		}
	} else {
		// A guest that ignores THRE loses bytes that do not fit.
		u.out.Put([]byte{b})
		u.full = u.out.Room() < fifoSize
	}
	u.thri = !u.full
}

// transmitterReady is called when the output has room for a FIFO's worth again.
func (u *UART) transmitterReady() {
	u.regs.Lock()
	defer u.regs.Unlock()
	if u.full && u.out.Room() >= fifoSize {
		u.full, u.thri = false, true
		u.update()
	}
}

// writeFCR sets FIFO control. The transmit FIFO is always empty: bytes go directly
// to the output queue.
func (u *UART) writeFCR(b byte) {
	if (b^u.fcr)&fcrEnable != 0 || b&(fcrEnable|fcrRXOff) == fcrEnable|fcrRXOff {
		u.fifo = u.fifo[:0]
	}
	u.fcr = 0
	if b&fcrEnable != 0 {
		u.fcr = b & fcrKept
	}
	u.refill()
}

// writeMCR sets modem control. In loopback its outputs are the modem lines;
// otherwise the lines are those of a terminal that is always ready.
func (u *UART) writeMCR(b byte) {
	u.mcr = b
	lines := byte(msrDCD | msrDSR | msrCTS)
	if b&mcrLoop != 0 {
		lines = 0
		for _, l := range [...]struct{ out, line byte }{{mcrRTS, msrCTS}, {mcrDTR, msrDSR}, {mcrOut1, msrRI}, {mcrOut2, msrDCD}} {
			if b&l.out != 0 {
				lines |= l.line
			}
		}
	}
	changed := (u.msr ^ lines) & msrLines
	if lines&msrRI != 0 {
		changed &^= msrRI // only the end of RI sets TERI
	}
	u.msr = lines | u.msr&^msrLines | changed>>4
	u.refill()
}

// depth is how many bytes the receiver holds.
func (u *UART) depth() int {
	if u.fcr&fcrEnable != 0 {
		return fifoSize
	}
	return 1
}

// refill moves pending input to the receive FIFO. In loopback the receiver is
// disconnected from the line.
func (u *UART) refill() {
	n := min(len(u.pending), u.depth()-len(u.fifo))
	if n <= 0 || u.mcr&mcrLoop != 0 {
		return
	}
	u.fifo = append(u.fifo, u.pending[:n]...)
	u.pending = u.pending[:copy(u.pending, u.pending[n:])]
	select {
	case u.room <- struct{}{}:
	default:
	}
}

// lineStatus returns LSR.
func (u *UART) lineStatus() byte {
	status := byte(0)
	if len(u.fifo) > 0 {
		status |= lsrDR
	}
	if u.overrun {
		status |= lsrOE
	}
	if !u.full {
		// TEMT as well: guests wait for it after each byte, which must not
		// make them wait for the backend.
		status |= lsrTHRE | lsrTEMT
	}
	return status
}

// interrupt returns the identification of the most urgent interrupt.
func (u *UART) interrupt() byte {
	switch {
	case u.ier&ierLine != 0 && u.overrun:
		return iirLine
	case u.ier&ierRX != 0 && len(u.fifo) > 0:
		if u.fcr&fcrEnable != 0 && len(u.fifo) < triggers[u.fcr>>6] {
			return iirTime
		}
		return iirRX
	case u.ier&ierTHRE != 0 && u.thri:
		return iirTHRE
	case u.ier&ierModem != 0 && u.msr&^msrLines != 0:
		return iirModem
	}
	return iirNone
}

// update sets the interrupt line.
func (u *UART) update() {
	if level := u.interrupt() != iirNone; level != u.line {
		u.line = level
		u.irq(level)
	}
}

// Drain waits until the backend has taken all output, except for a line that is
// held, or until ctx ends. A guest that goes on sending can make it wait.
func (u *UART) Drain(ctx context.Context) error {
	if err := u.out.Drain(ctx); err != nil {
		return fmt.Errorf("serial port: %w", err)
	}
	return nil
}

// HoldLine sets whether a line that the guest has begun and not ended is held.
// During a handoff it is: the line travels in the [State], and the destination
// prints it whole.
func (u *UART) HoldLine(hold bool) { u.out.Hold(hold) }

// Close ends the goroutine that writes output, and drops what the backend has not
// taken ([UART.Drain] first). It waits for a Write under way, so a backend that is
// stuck is closed before the UART. It returns the first error of a Write. The port
// can still be used; its output is dropped.
func (u *UART) Close() error {
	if err := u.out.Close(); err != nil {
		return fmt.Errorf("serial port: output: %w", err)
	}
	return nil
}
