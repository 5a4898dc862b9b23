package machine

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm/serial"
)

// COM1, as on every PC.
const (
	portCOM1  = 0x3f8
	portsUART = 8
	irqCOM1   = 4
)

// Ends are the other ends of a machine's lines of characters on this host; every
// [serial.Backend] can be one. They belong to the caller and outlive the machine;
// nil: output is dropped and there is no input.
type Ends struct {
	Serial  virtio.Console // COM1
	Console virtio.Console // the virtio console, if there is one
}

func (e Ends) orNothing() Ends {
	if e.Serial == nil {
		e.Serial = nothing{}
	}
	if e.Console == nil {
		e.Console = nothing{}
	}
	return e
}

// nothing is the other end of a line that was given none.
type nothing struct{}

func (nothing) Write(p []byte) (int, error)                    { return len(p), nil }
func (nothing) ReadInput(context.Context, []byte) (int, error) { return 0, io.EOF }

// lines are the serial port, and everything with input that arrives while the
// guest may run.
type lines struct {
	uart     *serial.UART
	feeds    []*feed // does not change once the machine is made, like drainers
	drainers []virtio.Drainer
}

// feed is a goroutine that brings a device's input, as long as the guest may
// run.
type feed struct {
	name  string // of the device
	serve func(context.Context) error

	inputMu sync.Mutex // guards stop and ended; held while the goroutine is started or awaited
	stop    context.CancelFunc
	ended   chan struct{}
}

// start lets input come, until halt.
func (f *feed) start(log *slog.Logger) {
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
			log.Warn("input has ended", "device", f.name, "err", err)
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

// createSerial makes the serial port.
func (m *Machine) createSerial() error {
	uart := serial.New(m.raiseCOM1, m.ends.Serial)
	uart.HoldLine(true) // until the guest may run
	m.lines.uart = uart
	m.lines.feeds = append(m.lines.feeds, &feed{name: "serial port", serve: func(ctx context.Context) error { return uart.Serve(ctx, m.ends.Serial) }})
	return m.board.ports.Claim(portCOM1, portsUART, uartDevice{uart})
}

// raiseCOM1 drives the serial port's interrupt line.
func (m *Machine) raiseCOM1(level bool) {
	if err := m.kernel.vm.IRQLine(irqCOM1, level); err != nil {
		m.log.Error("interrupt line", "device", "serial port", "err", err)
	}
}

// startInput lets input come, until stopInput.
func (m *Machine) startInput() {
	m.lines.uart.HoldLine(false)
	for _, f := range m.lines.feeds {
		f.start(m.log)
	}
}

// stopInput returns when no more input comes; what was read is in the devices.
func (m *Machine) stopInput() {
	for _, f := range m.lines.feeds {
		f.halt()
	}
	m.lines.uart.HoldLine(true)
}

// Drain waits until the other ends of the machine's lines have taken what the
// guest sent, or until ctx ends, whose error it returns then.
func (m *Machine) Drain(ctx context.Context) error {
	errs := make([]error, len(m.lines.drainers)+1)
	var all sync.WaitGroup
	for i, d := range append([]virtio.Drainer{m.lines.uart}, m.lines.drainers...) {
		all.Go(func() { errs[i] = d.Drain(ctx) })
	}
	all.Wait()
	return errors.Join(errs...)
}

// closeSerial ends the serial port, and all input. It waits for a Write of its
// other end that is under way.
func (m *Machine) closeSerial() error {
	if m.lines.uart == nil {
		return nil
	}
	m.ending.step.begin("the serial port: a write of its other end")
	m.stopInput()
	return m.lines.uart.Close()
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
