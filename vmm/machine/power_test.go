package machine

import (
	"errors"
	"testing"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/vmm/acpi"
)

// TestButtonAsLinuxHasIt: Linux's ACPICA turns all fixed events off when it starts, and
// the driver of the button turns it on.
func TestButtonAsLinuxHasIt(t *testing.T) {
	listens := func(m *Machine) bool {
		err := m.PressPowerButton()
		if err != nil && !errors.Is(err, kind.ErrState) {
			t.Error(err)
		}
		return err == nil
	}
	m := newMachine(t, 1, vmtest.Obey, nil)
	enable := func(v byte) { m.board.ports.Write(acpi.PMEvents+3, []byte{v}) }
	if listens(m) {
		t.Error("a guest that has not started listens")
	}
	enable(0)
	if listens(m) {
		t.Error("a kernel with ACPI and without the button's driver listens")
	}
	enable(1)
	if !listens(m) {
		t.Error("nobody listens")
	}
	enable(0) // Linux on its way down
	if listens(m) {
		t.Error("a guest that powers off listens")
	}
}
