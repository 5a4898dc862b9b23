package console

import (
	"bytes"
	"fmt"

	"github.com/govmm/govmm/internal/charqueue"
	"github.com/govmm/govmm/internal/strictcbor"
)

// State is what travels with a migration: the input that the guest has not read,
// and of the output the line that the guest has not ended. The console at the
// source still writes whole lines ([Device.Drain]).
type State struct {
	Columns uint16 `cbor:"columns"`
	Rows    uint16 `cbor:"rows"`
	Input   []byte `cbor:"input"`  // at most 4096 bytes
	Line    []byte `cbor:"line"`   // at most 64 KiB, no newline
	Offset  uint32 `cbor:"offset"` // bytes of the transmit queue's next chain that are in the output already
}

// SaveState implements [virtio.Device].
func (d *Device) SaveState() ([]byte, error) {
	d.serving.Lock()
	s := State{
		Columns: d.size.Columns, Rows: d.size.Rows,
		Input: append([]byte{}, d.input...), Line: d.out.Line(), Offset: uint32(d.offset),
	}
	d.serving.Unlock()
	b, err := strictcbor.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("console: encode the state: %w", err)
	}
	return b, nil
}

// LoadState implements [virtio.Device]. The device has not been used. An unfinished
// line is held until Activate.
func (d *Device) LoadState(b []byte) error {
	var s State
	if err := strictcbor.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("console: decode the state: %w", err)
	}
	switch {
	case len(s.Input) > maxInput:
		return fmt.Errorf("console: state: input must have at most %d bytes, got %d", maxInput, len(s.Input))
	case len(s.Line) > charqueue.Size || bytes.IndexByte(s.Line, '\n') >= 0:
		return fmt.Errorf("console: state: an unfinished line must have no newline and at most %d bytes, got %d", charqueue.Size, len(s.Line))
	}
	d.serving.Lock()
	defer d.serving.Unlock()
	d.size = Config{s.Columns, s.Rows}
	d.input = append(d.input[:0], s.Input...)
	d.offset = int(s.Offset)
	d.out.Hold(true)
	d.out.Put(s.Line)
	return nil
}
