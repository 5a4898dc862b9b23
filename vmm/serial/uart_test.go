package serial

import (
	"bytes"
	"context"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/charqueue"
)

// sink is a backend that remembers output, and can be stuck.
type sink struct {
	mu     sync.Mutex // guards buf and writes
	buf    bytes.Buffer
	writes int
	gate   chan struct{} // if not nil, each Write takes a value from it first
}

func (s *sink) Write(p []byte) (int, error) {
	if s.gate != nil {
		if _, ok := <-s.gate; !ok {
			return 0, io.ErrClosedPipe
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writes++
	return s.buf.Write(p)
}

func (s *sink) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}

// irqLine is an interrupt line that remembers its level and rising edges.
type irqLine struct {
	mu    sync.Mutex // guards all below
	level bool
	edges int
}

func (l *irqLine) set(level bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if level && !l.level {
		l.edges++
	}
	l.level = level
}

func (l *irqLine) get() (level bool, edges int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.level, l.edges
}

// newUART makes a UART for one test.
func newUART(t testing.TB, out io.Writer) (*UART, *irqLine) {
	t.Helper()
	line := &irqLine{}
	u := New(line.set, out)
	t.Cleanup(func() {
		if s, ok := out.(*sink); ok && s.gate != nil {
			close(s.gate)
		}
		_ = u.Close()
	})
	return u, line
}

// wantReg reads a register.
func wantReg(t *testing.T, u *UART, off uint8, want byte, when string) {
	t.Helper()
	if got := u.ReadPort(off); got != want {
		t.Errorf("%s: register %d is %#x, want %#x", when, off, got, want)
	}
}

func wantLine(t *testing.T, l *irqLine, want bool, when string) {
	t.Helper()
	if level, _ := l.get(); level != want {
		t.Errorf("%s: interrupt line %v, want %v", when, level, want)
	}
}

func TestPowerOn(t *testing.T) {
	u, line := newUART(t, io.Discard)
	for off, want := range []byte{0, 0, 0x01, 0, 0, 0x60, 0xb0, 0} {
		wantReg(t, u, uint8(off), want, "power-on")
	}
	wantReg(t, u, 8, 0xff, "beyond the registers")
	u.WritePort(regLCR, lcrDLAB)
	wantReg(t, u, 0, 12, "divisor")
	wantReg(t, u, 1, 0, "divisor")
	u.WritePort(0, 0x34)
	u.WritePort(1, 0x12)
	wantReg(t, u, 0, 0x34, "divisor")
	wantReg(t, u, 1, 0x12, "divisor")
	u.WritePort(regLCR, 3)
	wantReg(t, u, 1, 0, "IER after the divisor")
	wantLine(t, line, false, "power-on")
}

// What Linux's 8250 driver does to find out which chip it has
// (drivers/tty/serial/8250/8250_port.c, autoconfig and size_fifo) finds a
// 16550A with 16 bytes of FIFO, and nothing later.
func TestProbeFinds16550A(t *testing.T) {
	u, line := newUART(t, io.Discard)
	// There is something: IER has 4 bits.
	u.WritePort(regIER, 0)
	wantReg(t, u, regIER, 0, "IER cleared")
	u.WritePort(regIER, 0x0f)
	wantReg(t, u, regIER, 0x0f, "IER set")
	u.WritePort(regIER, 0)
	// Loopback: RTS and OUT2 come back as CTS and DCD.
	u.WritePort(regMCR, mcrLoop|mcrOut2|mcrRTS)
	if got := u.ReadPort(regMSR) & 0xf0; got != msrDCD|msrCTS {
		t.Errorf("MSR in loopback is %#x", got)
	}
	u.WritePort(regMCR, 0)
	// The FIFO is enabled and works.
	u.WritePort(regLCR, 0xbf)
	u.WritePort(2, 0)
	u.WritePort(regLCR, 0)
	u.WritePort(2, fcrEnable)
	if got := u.ReadPort(regIIR) >> 6; got != 3 {
		t.Errorf("IIR's FIFO bits are %d", got)
	}
	// No enhanced features register behind LCR=0xbf (16650, 16850).
	u.WritePort(regLCR, 0xbf)
	if got := u.ReadPort(2); got == 0 {
		t.Error("register 2 reads as 0 under LCR=0xbf: taken for a 16650")
	}
	// No second bank under LCR=0xe0 (NS16550A superchip).
	u.WritePort(regLCR, 0)
	mcr := u.ReadPort(regMCR)
	u.WritePort(regLCR, 0xe0)
	if (u.ReadPort(2)^mcr)&mcrLoop == 0 {
		u.WritePort(regLCR, 0)
		u.WritePort(regMCR, mcr^mcrLoop)
		u.WritePort(regLCR, 0xe0)
		status := u.ReadPort(2)
		u.WritePort(regLCR, 0)
		u.WritePort(regMCR, mcr)
		if (status^mcr)&mcrLoop != 0 {
			t.Error("taken for an NS superchip")
		}
	}
	// No 64-byte FIFO (TI16750).
	u.WritePort(2, fcrEnable|0x20)
	first := u.ReadPort(regIIR) >> 5
	u.WritePort(2, fcrEnable)
	u.WritePort(regLCR, lcrDLAB)
	u.WritePort(2, fcrEnable|0x20)
	second := u.ReadPort(regIIR) >> 5
	u.WritePort(2, fcrEnable)
	u.WritePort(regLCR, 0)
	if first == 6 && second == 7 {
		t.Error("taken for a TI16750")
	}
	// No UART unit enable (XScale).
	u.WritePort(regIER, 0x40)
	wantReg(t, u, regIER, 0, "IER bit 6")
	// The scratch register.
	for _, b := range []byte{0x55, 0xaa} {
		u.WritePort(regSCR, b)
		wantReg(t, u, regSCR, b, "scratch")
	}
	// The FIFO's size by loopback.
	u.WritePort(2, fcrEnable|fcrRXOff|4)
	u.WritePort(regMCR, mcrLoop)
	for i := range 256 {
		u.WritePort(regData, byte(i))
	}
	size := 0
	for ; u.ReadPort(regLSR)&lsrDR != 0 && size < 256; size++ {
		wantReg(t, u, regData, byte(size), "FIFO in loopback")
	}
	if size != 16 {
		t.Errorf("FIFO of %d bytes", size)
	}
	u.WritePort(regMCR, 0)
	// The transmitter's interrupt comes each time that it is enabled.
	for range 2 {
		u.WritePort(regIER, ierTHRE)
		wantLine(t, line, true, "THRE enabled")
		wantReg(t, u, regIIR, iirFIFO|iirTHRE, "THRE enabled")
		wantLine(t, line, false, "IIR read")
		u.WritePort(regIER, 0)
		wantReg(t, u, regIIR, iirFIFO|iirNone, "THRE disabled")
	}
	wantReg(t, u, regLSR, 0x60, "after all")
}

// A driver that sends by interrupts sends everything, and each batch makes a
// rising edge.
func TestTransmitByInterrupt(t *testing.T) {
	out := &sink{}
	u, line := newUART(t, out)
	text := bytes.Repeat([]byte("0123456789abcde\n"), 1000)
	u.WritePort(2, fcrEnable)
	u.WritePort(regIER, ierTHRE)
	left, seen := text, 0
	for len(left) > 0 {
		_, edges := line.get()
		if edges == seen {
			if err := u.Drain(context.Background()); err != nil {
				t.Fatal(err)
			}
			if _, edges = line.get(); edges == seen {
				t.Fatalf("no interrupt with %d bytes left", len(left))
			}
		}
		seen = edges
		for _, b := range left[:16] {
			u.WritePort(regData, b)
		}
		left = left[16:]
	}
	if err := u.Drain(context.Background()); err != nil {
		t.Fatal(err)
	}
	if out.String() != string(text) {
		t.Errorf("%d bytes came out, or others than the %d sent", len(out.String()), len(text))
	}
	if out.writes > len(text)/16 {
		t.Errorf("%d writes for %d lines", out.writes, len(text)/16)
	}
}

// fillUntilStuck writes until the other end of the line takes no more. A busy
// transmitter alone does not say so: the output may just be under way.
func fillUntilStuck(t *testing.T, u *UART) {
	t.Helper()
	for stuck := false; !stuck; {
		for u.ReadPort(regLSR)&lsrTHRE != 0 {
			for range fifoSize {
				u.WritePort(regData, 'x')
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		stuck = u.Drain(ctx) != nil
		cancel()
	}
}

// While the backend is stuck the transmitter is busy, no write waits, and what
// was taken comes out once it can.
func TestStuckBackend(t *testing.T) {
	out := &sink{gate: make(chan struct{})}
	u, line := newUART(t, out)
	u.WritePort(2, fcrEnable)
	sent := 0
	for u.ReadPort(regLSR)&lsrTHRE != 0 {
		for range fifoSize {
			u.WritePort(regData, byte(sent))
			sent++
		}
		if sent > 2*charqueue.Size {
			t.Fatal("the transmitter is never busy")
		}
	}
	u.WritePort(regIER, ierTHRE)
	wantLine(t, line, false, "transmitter busy")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := u.Drain(ctx); err == nil {
		t.Error("Drain of a stuck backend succeeded")
	}
	if s := u.SaveState(); !s.THREPending {
		t.Error("the saved state forgets the transmitter's interrupt")
	}
	drained := make(chan error, 1)
	go func() { drained <- u.Drain(context.Background()) }()
	for done := false; !done; {
		select {
		case out.gate <- struct{}{}:
		case err := <-drained:
			if err != nil {
				t.Fatal(err)
			}
			done = true
		}
	}
	wantReg(t, u, regLSR, 0x60, "drained")
	got := out.String()
	if len(got) != sent {
		t.Fatalf("%d bytes came out of %d", len(got), sent)
	}
	for i := range got {
		if got[i] != byte(i) {
			t.Fatalf("byte %d is %#x", i, got[i])
		}
	}
	// transmitterReady runs after the Write that made room.
	for level, _ := line.get(); !level; level, _ = line.get() {
	}
}

// A guest that ignores LSR loses its own bytes and nothing else.
func TestOverfullOutput(t *testing.T) {
	out := &sink{gate: make(chan struct{})}
	u, _ := newUART(t, out)
	for range 3 * charqueue.Size {
		u.WritePort(regData, 'x')
	}
	if got := u.out.Room(); got != 0 {
		t.Errorf("room for %d bytes", got)
	}
	wantReg(t, u, regLSR, 0, "overfull")
}

func TestReceive(t *testing.T) {
	u, line := newUART(t, io.Discard)
	if n := u.Feed([]byte("ab")); n != 2 {
		t.Fatalf("Feed took %d", n)
	}
	wantLine(t, line, false, "interrupts disabled")
	u.WritePort(regIER, ierRX)
	wantLine(t, line, true, "data, no FIFO")
	wantReg(t, u, regIIR, iirRX, "data, no FIFO")
	wantReg(t, u, regData, 'a', "first")
	wantLine(t, line, true, "second byte")
	wantReg(t, u, regData, 'b', "second")
	wantLine(t, line, false, "empty")
	wantReg(t, u, regLSR, 0x60, "empty")

	u.WritePort(2, fcrEnable|0x80) // trigger at 8
	u.Feed([]byte("1234567"))
	wantReg(t, u, regIIR, iirFIFO|iirTime, "7 of 8 bytes")
	u.Feed([]byte("8"))
	wantReg(t, u, regIIR, iirFIFO|iirRX, "8 of 8 bytes")
	wantReg(t, u, regData, '1', "FIFO")
	wantReg(t, u, regIIR, iirFIFO|iirTime, "7 left")
	u.WritePort(2, fcrEnable|fcrRXOff)
	wantLine(t, line, false, "FIFO cleared")
	wantReg(t, u, regIIR, iirFIFO|iirNone, "FIFO cleared")

	// Nothing is dropped: what does not fit waits, and Feed says so.
	big := bytes.Repeat([]byte("0123456789"), 1000)
	n := u.Feed(big)
	if n != maxPending {
		t.Errorf("Feed took %d bytes", n)
	}
	n += u.Feed(big[n:])
	if n != maxPending+fifoSize {
		t.Errorf("%d bytes fit", n)
	}
	for i := range n {
		wantReg(t, u, regData, big[i], "input")
	}
	wantReg(t, u, regLSR, 0x60, "all read")
}

func TestInterruptPriority(t *testing.T) {
	u, line := newUART(t, io.Discard)
	u.WritePort(regMCR, mcrLoop)
	u.ReadPort(regMSR)
	u.WritePort(regIER, 0x0f)
	u.WritePort(regData, 'a')
	u.WritePort(regData, 'b')             // overrun
	u.WritePort(regMCR, mcrLoop|mcrRTS)   // a change of CTS
	wantReg(t, u, regIIR, iirLine, "all") // read LSR
	wantReg(t, u, regLSR, 0x63, "all")
	wantReg(t, u, regIIR, iirRX, "line status read")
	wantReg(t, u, regData, 'b', "overrun without FIFO")
	wantReg(t, u, regIIR, iirTHRE, "data read")
	wantReg(t, u, regIIR, iirModem, "IIR read")
	wantReg(t, u, regMSR, msrCTS|0x01, "modem")
	wantReg(t, u, regIIR, iirNone, "modem status read")
	wantLine(t, line, false, "all answered")
	// RI counts when it ends.
	u.WritePort(regMCR, mcrLoop|mcrRTS|mcrOut1)
	wantReg(t, u, regMSR, msrCTS|msrRI, "RI on")
	u.WritePort(regMCR, mcrLoop|mcrRTS)
	wantReg(t, u, regMSR, msrCTS|msrTERI, "RI off")
}

// In loopback nothing goes out, and input waits outside.
func TestLoopback(t *testing.T) {
	out := &sink{}
	u, _ := newUART(t, out)
	u.WritePort(regMCR, mcrLoop)
	u.Feed([]byte("outside"))
	u.WritePort(regData, 'x')
	wantReg(t, u, regData, 'x', "loopback")
	wantReg(t, u, regLSR, 0x60, "loopback")
	u.WritePort(regMCR, 0)
	wantReg(t, u, regData, 'o', "after loopback")
	if err := u.Drain(context.Background()); err != nil || out.String() != "" {
		t.Errorf("%q went out, %v", out.String(), err)
	}
}

// What is on its way stays so over a reset.
func TestReset(t *testing.T) {
	u, line := newUART(t, io.Discard)
	u.WritePort(2, fcrEnable)
	u.WritePort(regIER, 0x0f)
	u.Feed(bytes.Repeat([]byte("x"), 20))
	wantLine(t, line, true, "input")
	u.Reset()
	wantLine(t, line, false, "reset")
	wantReg(t, u, regIER, 0, "reset")
	wantReg(t, u, regLSR, 0x61, "reset")
}
