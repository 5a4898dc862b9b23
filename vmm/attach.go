package vmm

import (
	"errors"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/vmm/serial"
)

// Lines that can be attached to.
const (
	LineSerial  = "serial"  // the serial port
	LineConsole = "console" // the virtio console
)

// Attach joins one of the VM's lines: what the guest has written last, up to
// [serial.Scrollback] bytes, and what it writes from now on, is read; with write, what is
// written is input for the guest. At most one may write. Whoever does not read in time
// loses output, and delays nobody. The viewer ends with the VM.
func (v *VM) Attach(line string, write bool) (*serial.Viewer, error) {
	l, ok := v.shared[line]
	if !ok {
		if line != LineSerial && line != LineConsole {
			return nil, kind.Invalid("line %.40q: expected %s or %s", line, LineSerial, LineConsole)
		}
		return nil, kind.State("the VM has no %s", line)
	}
	viewer, err := l.Attach(write)
	switch {
	case errors.Is(err, serial.ErrHasWriter):
		return nil, kind.State("%w: attach to it without writing", err)
	case errors.Is(err, serial.ErrCrowded):
		return nil, kind.State("%w", err)
	case err != nil:
		return nil, kind.State("the VM has stopped")
	}
	return viewer, nil
}
