package serial

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
)

// A UART in the middle of everything goes on at the destination where it was.
func TestSaveLoad(t *testing.T) {
	u, _ := newUART(t, io.Discard)
	u.WritePort(regLCR, lcrDLAB|3)
	u.WritePort(0, 0x21)
	u.WritePort(1, 0x43)
	u.WritePort(regLCR, 3)
	u.WritePort(2, fcrEnable|0xc0)
	u.WritePort(regMCR, mcrDTR|mcrRTS|mcrOut2)
	u.WritePort(regSCR, 0x77)
	u.WritePort(regIER, ierRX|ierTHRE)
	u.Feed(bytes.Repeat([]byte("0123456789"), 4))
	for range 3 {
		u.ReadPort(regData)
	}
	s := u.SaveState()

	dst, line := newUART(t, io.Discard)
	if err := dst.LoadState(s); err != nil {
		t.Fatal(err)
	}
	wantLine(t, line, true, "loaded")
	for _, off := range []uint8{regIER, regIIR, regLCR, regMCR, regLSR, regMSR, regSCR} {
		wantReg(t, dst, off, u.ReadPort(off), "destination")
	}
	for i := 3; i < 40; i++ {
		want := u.ReadPort(regData)
		wantReg(t, dst, regData, want, "input at the destination")
		if want != byte('0'+i%10) {
			t.Errorf("input byte %d is %q", i, want)
		}
	}
	wantReg(t, dst, regIIR, iirFIFO|iirTHRE, "all read")
	dst.WritePort(regLCR, lcrDLAB)
	wantReg(t, dst, 0, 0x21, "divisor")
	wantReg(t, dst, 1, 0x43, "divisor")

	// A state is a copy: what is done with the other UART does not change it.
	third, line := newUART(t, io.Discard)
	if err := third.LoadState(s); err != nil {
		t.Fatal(err)
	}
	wantReg(t, third, regData, '3', "loaded twice")
	// A state without interrupts takes the line down.
	if err := third.LoadState(State{}); err != nil {
		t.Fatal(err)
	}
	wantLine(t, line, false, "empty state")
}

func TestLoadRefuses(t *testing.T) {
	u, _ := newUART(t, io.Discard)
	u.WritePort(regSCR, 0x42)
	for _, s := range []State{
		{IER: 0x10}, {MCR: 0x20}, {FCR: 0x06}, {FCR: 0xc0},
		{FIFO: make([]byte, 2)}, {FCR: 1, FIFO: make([]byte, 17)}, {Pending: make([]byte, maxPending+1)},
	} {
		if err := u.LoadState(s); err == nil {
			t.Errorf("%+v was loaded", s)
		}
	}
	wantReg(t, u, regSCR, 0x42, "refused states")
}

// input is an Input that hands out chunks, and then waits for ctx.
type input struct {
	chunks [][]byte
	eof    bool
}

func (in *input) ReadInput(ctx context.Context, p []byte) (int, error) {
	if len(in.chunks) == 0 {
		if in.eof {
			return 0, io.EOF
		}
		<-ctx.Done()
		return 0, ctx.Err()
	}
	n := copy(p, in.chunks[0])
	if in.chunks[0] = in.chunks[0][n:]; len(in.chunks[0]) == 0 {
		in.chunks = in.chunks[1:]
	}
	return n, nil
}

// Serve delivers everything in order, however slowly the guest reads, and
// what it has read when it ends is in the state.
func TestServe(t *testing.T) {
	text := make([]byte, 3*maxPending)
	for i := range text {
		text[i] = byte(i * 7)
	}
	u, _ := newUART(t, io.Discard)
	done := make(chan error, 1)
	go func() {
		done <- u.Serve(context.Background(), &input{chunks: [][]byte{text[:1], text[1:5000], text[5000:]}, eof: true})
	}()
	for i := 0; i < len(text); {
		if u.ReadPort(regLSR)&lsrDR != 0 {
			if got := u.ReadPort(regData); got != text[i] {
				t.Fatalf("byte %d is %#x, want %#x", i, got, text[i])
			}
			i++
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}

	ctx, cancel := context.WithCancel(context.Background())
	in := &input{chunks: [][]byte{text}}
	go func() { done <- u.Serve(ctx, in) }()
	for u.ReadPort(regLSR)&lsrDR == 0 {
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	s := u.SaveState()
	got := append(append(append([]byte{}, s.FIFO...), s.Pending...), bytes.Join(in.chunks, nil)...)
	if !bytes.Equal(got, text) {
		t.Errorf("%d bytes in the state and %d unread are not the %d given", len(s.FIFO)+len(s.Pending), len(bytes.Join(in.chunks, nil)), len(text))
	}
}

// Whatever a guest does to the registers, the UART holds together: its line
// follows IIR, its FIFO keeps its bounds, and a UART with the same state answers as it does.
func FuzzRegisters(f *testing.F) {
	f.Add([]byte{0x81, 0x0f, 0x82, 0xc7, 0x80, 'x', 0x02, 0, 0x00, 0})
	f.Add([]byte{0x84, 0x10, 0x80, 'x', 0x80, 'y', 0x05, 0, 0x48, 'z', 0x84, 0, 0x00, 0})
	f.Fuzz(func(t *testing.T, ops []byte) {
		u, line := newUART(t, io.Discard)
		exercise(t, u, line, ops)
		dst, _ := newUART(t, io.Discard)
		if err := dst.LoadState(u.SaveState()); err != nil {
			t.Fatal(err)
		}
		for _, off := range []uint8{5, 6, 2, 3, 4, 7, 1, 0, 0, 2, 5} {
			if got, want := dst.ReadPort(off), u.ReadPort(off); got != want {
				t.Fatalf("register %d of the destination is %#x, not %#x", off, got, want)
			}
		}
	})
}

func BenchmarkTransmit(b *testing.B) {
	u, _ := newUART(b, io.Discard)
	for i := range b.N {
		for u.ReadPort(regLSR)&lsrTHRE == 0 {
		}
		u.WritePort(regData, "0123456789abcde\n"[i%16])
	}
}

// A line that is cut by a handoff is printed whole by the destination, and not at all
// by the UART that it was begun on; if the handoff fails, by that one.
func TestHeldLineTravels(t *testing.T) {
	ctx := t.Context()
	say := func(u *UART, s string) {
		for i := range len(s) {
			u.WritePort(0, s[i])
		}
	}
	var here, there sink
	a, b := New(func(bool) {}, &here), New(func(bool) {}, &there)
	b.HoldLine(true)
	say(a, "one\n")
	a.HoldLine(true)
	say(a, "tw")
	if err := a.Drain(ctx); err != nil {
		t.Fatal(err)
	}
	if got := here.String(); got != "one\n" {
		t.Fatalf("before the handoff came %q", got)
	}
	s := a.SaveState()
	if string(s.Line) != "tw" {
		t.Fatalf("the state has the line %q", s.Line)
	}
	if err := b.LoadState(s); err != nil {
		t.Fatal(err)
	}
	if again := b.SaveState(); string(again.Line) != "tw" {
		t.Errorf("the destination's state has the line %q", again.Line)
	}
	b.HoldLine(false)
	say(b, "o\n")
	if err := b.Drain(ctx); err != nil {
		t.Fatal(err)
	}
	if got := there.String(); got != "two\n" {
		t.Errorf("the destination printed %q", got)
	}
	a.HoldLine(false) // as if the handoff had failed
	if err := a.Drain(ctx); err != nil {
		t.Fatal(err)
	}
	if got := here.String(); got != "one\ntw" {
		t.Errorf("taken back, it has printed %q", got)
	}
	for _, u := range []*UART{a, b} {
		if err := u.Close(); err != nil {
			t.Error(err)
		}
	}
	bad := s
	bad.Line = []byte("a\nb")
	if err := New(func(bool) {}, &there).LoadState(bad); err == nil {
		t.Error("an unfinished line with a newline was loaded")
	}
}

// exercise does what ops say with the registers and the other end, and checks after each
// that the UART holds together.
func exercise(t *testing.T, u *UART, line *irqLine, ops []byte) {
	t.Helper()
	for ; len(ops) >= 2; ops = ops[2:] {
		off := ops[0] & 0x0f
		switch {
		case ops[0]&0x80 != 0:
			u.WritePort(off, ops[1])
		case ops[0]&0x40 != 0:
			u.Feed(bytes.Repeat(ops[1:2], int(off)))
		default:
			u.ReadPort(off)
		}
		if level, _ := line.get(); level != (u.interrupt() != iirNone) {
			t.Fatalf("the line is %v, IIR %#x", level, u.interrupt())
		}
		if len(u.fifo) > u.depth() || len(u.pending) > maxPending {
			t.Fatalf("%d bytes in a FIFO of %d, %d wait", len(u.fifo), u.depth(), len(u.pending))
		}
		if len(u.pending) > 0 && len(u.fifo) < u.depth() && u.mcr&mcrLoop == 0 {
			t.Fatal("input waits with room in the FIFO")
		}
	}
}

// A state from a hostile source is refused, or the UART holds together with it.
func FuzzState(f *testing.F) {
	f.Add([]byte{1, 1, 3, 8, 0, 1, 0, 0, 3}, []byte("typed"), []byte("more"), []byte("a prompt"), []byte{0x81, 0x0f, 0x02, 0, 0x00, 0, 0x48, 'z'})
	f.Fuzz(func(t *testing.T, regs, fifo, pending, unended, ops []byte) {
		if len(regs) < 9 {
			return
		}
		s := State{IER: regs[0], FCR: regs[1], LCR: regs[2], MCR: regs[3], SCR: regs[4], DLL: regs[5], DLM: regs[6], MSR: regs[7],
			Overrun: regs[8]&1 != 0, THREPending: regs[8]&2 != 0, FIFO: fifo, Pending: pending, Line: unended}
		u, line := newUART(t, io.Discard)
		if u.LoadState(s) == nil {
			exercise(t, u, line, ops)
		}
	})
}
