package console

import (
	"bytes"
	"fmt"

	"github.com/govmm/govmm/internal/charqueue"
	"github.com/govmm/govmm/internal/strictcbor"
)

// State is what of a console travels with a migration. Input that the guest has
// not read goes with it: it was typed to the guest, not to a host. Of the
// output goes the line that the guest has not finished; whole lines are still
// written by the console that was saved from ([Device.Drain]).
type State struct {
	Columns uint16 `cbor:"columns"`
	Rows    uint16 `cbor:"rows"`
	Input   []byte `cbor:"input"`  // at most 4096 bytes
	Line    []byte `cbor:"line"`   // at most 64 KiB, no newline
	Offset  uint32 `cbor:"offset"` // bytes of the transmit queue's next chain that are in the output
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
		return nil, fmt.Errorf("console: encode its state: %w", err)
	}
	return b, nil
}

// LoadState implements [virtio.Device]. The device has not been used. An
// unfinished line is kept back until Activate.
func (d *Device) LoadState(b []byte) error {
	var s State
	if err := strictcbor.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("console: decode its state: %w", err)
	}
	switch {
	case len(s.Input) > maxInput:
		return fmt.Errorf("console: its state has %d bytes of input, %d are possible", len(s.Input), maxInput)
	case len(s.Line) > charqueue.Size || bytes.IndexByte(s.Line, '\n') >= 0:
		return fmt.Errorf("console: its state has an unfinished line of %d bytes, %d without a newline are possible", len(s.Line), charqueue.Size)
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
