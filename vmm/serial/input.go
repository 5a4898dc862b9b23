package serial

import (
	"context"
	"errors"
	"io"
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
	buf := make([]byte, 1024)
	for {
		n, err := u.inputRoom(ctx)
		if err != nil {
			return err
		}
		n, err = in.ReadInput(ctx, buf[:min(n, len(buf))])
		for fed := 0; fed < n; {
			fed += u.Feed(buf[fed:n])
			if fed < n { // somebody else feeds too
				if _, err := u.inputRoom(ctx); err != nil {
					return err
				}
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// inputRoom waits until input can be taken, and returns how much.
func (u *UART) inputRoom(ctx context.Context) (int, error) {
	for {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		u.regs.Lock()
		n := maxPending - len(u.pending)
		u.regs.Unlock()
		if n > 0 {
			return n, nil
		}
		select {
		case <-u.room:
		case <-ctx.Done():
		}
	}
}
