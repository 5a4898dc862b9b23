package charqueue

import (
	"context"
	"errors"
	"io"
)

// MaxInput is how many bytes of input can wait for the guest.
const MaxInput = 4096

// Input is where a device's input comes from.
type Input interface {
	// ReadInput waits for input and stores it in p. It returns ctx's error when
	// that ends, and io.EOF when there will never be more.
	ReadInput(ctx context.Context, p []byte) (int, error)
}

// Sink is a device that takes input.
type Sink interface {
	// Feed takes as much of p as there is room for, and returns how much that
	// was. It does not wait.
	Feed(p []byte) int
	// InputRoom returns how much Feed takes.
	InputRoom() int
}

// Serve feeds to from in until ctx ends, or in does (nil), or reading fails. It
// reads only what there is room for, so that everything that was read is in the
// device when Serve returns. more has a value when InputRoom has grown.
func Serve(ctx context.Context, in Input, to Sink, more <-chan struct{}) error {
	buf := make([]byte, 1024)
	for {
		room, err := waitForRoom(ctx, to, more)
		if err != nil {
			return err
		}
		n, err := in.ReadInput(ctx, buf[:min(room, len(buf))])
		for fed := to.Feed(buf[:n]); fed < n; fed += to.Feed(buf[fed:n]) {
			// Feed was called by another goroutine, too.
			if _, err := waitForRoom(ctx, to, more); err != nil {
				return err
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

func waitForRoom(ctx context.Context, to Sink, more <-chan struct{}) (int, error) {
	for {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		if n := to.InputRoom(); n > 0 {
			return n, nil
		}
		select {
		case <-more:
		case <-ctx.Done():
		}
	}
}
