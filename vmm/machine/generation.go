package machine

import (
	"crypto/rand"
	"fmt"
	"sync"

	"github.com/govmm/govmm/vmm/acpi"
	"github.com/govmm/govmm/vmm/platform"
)

// featureGPE is in use while the guest has enabled a general-purpose event: that of the VM
// generation ID.
const featureGPE = "gpe"

// newGeneration draws a VM generation ID.
func newGeneration() (g acpi.Generation, err error) {
	if _, err := rand.Read(g[:]); err != nil {
		return g, fmt.Errorf("draw a VM generation ID: %w", err)
	}
	return g, nil
}

// generation reads the guest's VM generation ID; ok is false if its tables have none.
func (m *Machine) generation() (g acpi.Generation, ok bool) {
	var b [acpi.GenerationSize]byte
	if m.mem == nil || m.mem.ReadAt(b[:], acpi.GenerationMarker) != nil {
		return g, false
	}
	return acpi.ParseGeneration(b[:])
}

// renewGeneration changes the ID of a guest that is a copy, and tells it.
func (m *Machine) renewGeneration() error {
	if _, ok := m.generation(); !ok {
		return nil
	}
	g, err := newGeneration()
	if err == nil {
		err = m.mem.WriteAt(g[:], acpi.GenerationID)
	}
	if err != nil {
		return fmt.Errorf("change the VM generation ID: %w", err)
	}
	m.board.gpe.Raise(platform.GPEGeneration)
	return nil
}

// sharedLine is an interrupt line that several devices raise.
type sharedLine struct {
	set func(level bool)

	levelMu sync.Mutex // guards levels; held while the line is set
	levels  []bool
}

// input returns the function by which one device sets its level.
func (l *sharedLine) input() func(level bool) {
	l.levels = append(l.levels, false)
	i := len(l.levels) - 1
	return func(level bool) {
		l.levelMu.Lock()
		defer l.levelMu.Unlock()
		before := l.any()
		l.levels[i] = level
		if now := l.any(); now != before {
			l.set(now)
		}
	}
}

func (l *sharedLine) any() bool {
	for _, level := range l.levels {
		if level {
			return true
		}
	}
	return false
}
