package serial

import (
	"context"

	"github.com/govmm/govmm/internal/charqueue"
)

// Input is where a serial port's input comes from. Every [Backend] is one.
type Input interface {
	// ReadInput waits for input and stores it in p. It returns ctx's error
	// when that ends, and io.EOF when there will never be more.
	ReadInput(ctx context.Context, p []byte) (int, error)
}

// Feed takes input for the guest, as much of p as there is room for, and
// returns how much that was. It does not wait.
func (u *UART) Feed(p []byte) int {
	u.regs.Lock()
	defer u.regs.Unlock()
	n := min(len(p), maxPending-len(u.pending))
	u.pending = append(u.pending, p[:n]...)
	u.refill()
	u.update()
	return n
}

// Serve feeds the guest from in until ctx ends, or in's input does (nil), or
// reading fails. It reads only what there is room for, so that nothing is lost
// when it ends: what was read is in the UART, and in its saved state.
//
// A machine whose state is to be saved ends Serve first, and waits for it.
func (u *UART) Serve(ctx context.Context, in Input) error {
	return charqueue.Serve(ctx, in, feeder{u}, u.room)
}

// feeder is the UART as what takes input.
type feeder struct{ *UART }

// InputRoom implements charqueue.Sink.
func (s feeder) InputRoom() int {
	s.regs.Lock()
	defer s.regs.Unlock()
	return maxPending - len(s.pending)
}
