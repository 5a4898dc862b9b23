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

// Ends are what a machine's lines of characters lead to on this host. They stay
// the caller's and outlive the machine; nil: to nothing.
type Ends struct {
	Serial  Console // COM1
	Console Console // the virtio console, if there is one
}

// feed is a goroutine that brings a device's input, as long as the guest may
// run.
type feed struct {
	what  string
	serve func(context.Context) error

	inputMu sync.Mutex // guards stop and ended; held while the goroutine is started or awaited
	stop    context.CancelFunc
	ended   chan struct{}
}

// start lets input come, until halt.
func (f *feed) start(logf func(string, ...any)) {
	f.inputMu.Lock()
	defer f.inputMu.Unlock()
	if f.stop != nil {
		return
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	f.stop, f.ended = stop, ended
	go func() {
		defer close(ended)
		if err := f.serve(ctx); err != nil && !errors.Is(err, context.Canceled) {
			logf("%s: input has ended: %v", f.what, err)
		}
	}()
}

// halt returns when no more input comes; what was read is in the device.
func (f *feed) halt() {
	f.inputMu.Lock()
	defer f.inputMu.Unlock()
	if f.stop == nil {
		return
	}
	f.stop()
	<-f.ended
	f.stop = nil
}

// nothing is the console of a machine that was given none.
type nothing struct{}

func (nothing) Write(p []byte) (int, error)                    { return len(p), nil }
func (nothing) ReadInput(context.Context, []byte) (int, error) { return 0, io.EOF }

// connect makes the serial port.
func (m *Machine) connect() error {
	m.uart = serial.New(m.raiseCOM1, m.ends.Serial)
	m.uart.HoldLine(true) // until the guest may run
	m.feeds = append(m.feeds, &feed{what: "serial port", serve: func(ctx context.Context) error { return m.uart.Serve(ctx, m.ends.Serial) }})
	return m.ports.Claim(portCOM1, portsUART, uartDevice{m.uart})
}

// raiseCOM1 drives the serial port's interrupt line.
func (m *Machine) raiseCOM1(level bool) {
	if err := m.vm.IRQLine(irqCOM1, level); err != nil {
		m.logf("serial port: %v", err)
	}
}

// startInput lets input come, until stopInput.
func (m *Machine) startInput() {
	m.uart.HoldLine(false)
	for _, f := range m.feeds {
		f.start(m.logf)
	}
}

// stopInput returns when no more input comes; what was read is in the devices.
func (m *Machine) stopInput() {
	for _, f := range m.feeds {
		f.halt()
	}
	m.uart.HoldLine(true)
}

// Drain waits until what the guest has sent to its serial port and to its
// console has been taken by their other ends, or until ctx ends, whose error it
// returns then.
func (m *Machine) Drain(ctx context.Context) error {
	if err := m.uart.Drain(ctx); err != nil || m.hvc == nil {
		return err
	}
	return m.hvc.Drain(ctx)
}

// disconnect ends the serial port. It waits for a Write of its other end that
// is under way.
func (m *Machine) disconnect() error {
	if m.uart == nil {
		return nil
	}
	m.stopInput()
	return m.uart.Close()
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
