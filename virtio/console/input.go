package console

import (
	"context"

	"github.com/govmm/govmm/internal/charqueue"
)

// Input is where a console's input comes from.
type Input interface {
	// ReadInput waits for input and stores it in p. It returns ctx's error
	// when that ends, and io.EOF when there will never be more.
	ReadInput(ctx context.Context, p []byte) (int, error)
}

// Feed takes input for the guest, as much of p as there is room for, and
// returns how much that was. It does not wait. Input may come before the guest
// has a driver.
func (d *Device) Feed(p []byte) int {
	d.serving.Lock()
	n := min(len(p), maxInput-len(d.input))
	d.input = append(d.input, p[:n]...)
	d.serving.Unlock()
	signal(d.wake)
	return n
}

// Serve feeds the guest from in until ctx ends, or in's input does (nil), or
// reading fails. It reads only what there is room for, so that nothing is lost
// when it ends: what was read is in the console, and in its saved state.
//
// A machine whose state is to be saved ends Serve first, and waits for it. There
// is one Serve at a time.
func (d *Device) Serve(ctx context.Context, in Input) error {
	return charqueue.Serve(ctx, in, feeder{d}, d.room)
}

// feeder is the console as what takes input.
type feeder struct{ *Device }

// InputRoom implements charqueue.Sink.
func (s feeder) InputRoom() int {
	s.serving.Lock()
	defer s.serving.Unlock()
	return maxInput - len(s.input)
}
