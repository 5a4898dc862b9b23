package vmm

import (
	"context"
	"errors"
	"io"
	"sync"

	"github.com/govmm/govmm/vmm/serial"
)

// COM1, as on every PC.
const (
	portCOM1  = 0x3f8
	portsUART = 8
	irqCOM1   = 4
)

// Console is the other end of a machine's serial port; every
// [serial.Backend] is one.
type Console interface {
	io.Writer
	serial.Input
}

// console is a machine's serial port and the goroutine that brings its input.
type console struct {
	uart *serial.UART
	end  Console

	inputMu sync.Mutex // guards stop and ended; held while the goroutine is started or awaited
	stop    context.CancelFunc
	ended   chan struct{}
}

// nothing is the console of a machine that was given none.
type nothing struct{}

func (nothing) Write(p []byte) (int, error)                    { return len(p), nil }
func (nothing) ReadInput(context.Context, []byte) (int, error) { return 0, io.EOF }

// connect makes the serial port.
func (m *Machine) connect(end Console) error {
	if end == nil {
		end = nothing{}
	}
	m.console.end = end
	m.console.uart = serial.New(m.raiseCOM1, end)
	m.console.uart.HoldLine(true) // until the guest may run
	return m.ports.Claim(portCOM1, portsUART, uartDevice{m.console.uart})
}

// raiseCOM1 drives the serial port's interrupt line.
func (m *Machine) raiseCOM1(level bool) {
	if err := m.vm.IRQLine(irqCOM1, level); err != nil {
		m.logf("serial port: %v", err)
	}
}

// startInput lets input come, until stopInput.
func (m *Machine) startInput() {
	c := &m.console
	c.inputMu.Lock()
	defer c.inputMu.Unlock()
	if c.stop != nil {
		return
	}
	c.uart.HoldLine(false)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	c.stop, c.ended = stop, ended
	go func() {
		defer close(ended)
		if err := c.uart.Serve(ctx, c.end); err != nil && !errors.Is(err, context.Canceled) {
			m.logf("serial input has ended: %v", err)
		}
	}()
}

// stopInput returns when no more input comes; what was read is in the UART.
func (m *Machine) stopInput() {
	c := &m.console
	c.inputMu.Lock()
	defer c.inputMu.Unlock()
	if c.stop == nil {
		return
	}
	c.stop()
	<-c.ended
	c.stop = nil
	c.uart.HoldLine(true)
}

// Drain waits until what the guest has sent to its serial port has been taken
// by the console, or until ctx ends, whose error it returns then.
func (m *Machine) Drain(ctx context.Context) error { return m.console.uart.Drain(ctx) }

// disconnect ends the serial port. It waits for a Write of the console that is
// under way.
func (m *Machine) disconnect() error {
	if m.console.uart == nil {
		return nil
	}
	m.stopInput()
	return m.console.uart.Close()
}

// uartDevice puts the serial port's byte-wide registers on the bus: a wider
// access is one to several of them.
type uartDevice struct{ uart *serial.UART }

func (d uartDevice) Read(off uint64, p []byte) {
	for i := range p {
		p[i] = d.uart.ReadPort(uint8(off) + uint8(i))
	}
}

func (d uartDevice) Write(off uint64, p []byte) {
	for i := range p {
		d.uart.WritePort(uint8(off)+uint8(i), p[i])
	}
}
