package snapshot

import (
	"context"
	"errors"
	"fmt"

	"github.com/govmm/govmm/vmm/machine"
	"github.com/govmm/govmm/vmm/memory"
)

// Mode says how memory is restored.
type Mode string

// Modes.
const (
	// Auto is Lazy where memory can be mapped, otherwise Eager.
	Auto Mode = "auto"
	// Lazy maps the file: the guest runs before its memory has been read, and the file
	// must stay as it is for as long as the guest runs.
	Lazy Mode = "lazy"
	// Eager reads all of memory, and checks it, before the guest runs.
	Eager Mode = "eager"
)

// ParseMode reads one.
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case Auto, Lazy, Eager:
		return m, nil
	}
	return "", fmt.Errorf("%.80q: expected %s, %s or %s", s, Auto, Lazy, Eager)
}

// Restore makes the snapshot's machine with b, with its memory and state. It has not been
// started. The snapshot may be closed afterwards.
func (s *Snapshot) Restore(ctx context.Context, b *machine.Builder, mode Mode) (*machine.Machine, error) {
	saved, err := s.saved(ctx, mode)
	if err == nil {
		var m *machine.Machine
		if m, err = b.Restore(ctx, saved); err == nil {
			return m, nil
		}
	}
	return nil, fmt.Errorf("snapshot %s: %w", s.dir, err)
}

// Maps says whether memory is mapped in this mode.
func (s *Snapshot) Maps(mode Mode) bool { return mode != Eager && !s.packed() }

// saved reads the parts.
func (s *Snapshot) saved(ctx context.Context, mode Mode) (g machine.Saved, err error) {
	if s.Maps(mode) {
		mode = Lazy
	} else if mode != Lazy {
		mode = Eager
	}
	if mode == Lazy && s.packed() {
		return g, errors.New("its memory is compressed, so that it cannot be mapped: use --restore eager")
	}
	if g.Spec, err = s.part(specFile); err != nil {
		return g, err
	}
	if g.State, err = s.part(stateFile); err != nil {
		return g, err
	}
	if s.has(storageFile) {
		if g.Storage, err = s.part(storageFile); err != nil {
			return g, err
		}
	}
	large := s.mapPart
	if mode == Eager {
		large = s.optional
	}
	if g.Kernel, err = large(kernelFile); err != nil {
		return g, err
	}
	if g.Initrd, err = large(initrdFile); err != nil {
		return g, err
	}
	g.Session = s.session()
	g.Memory = func(size uint64, backing memory.Backing) (*memory.Memory, error) {
		if size != s.Manifest.Memory.Bytes {
			return nil, damaged("memory of %d bytes, and a machine with %d", s.Manifest.Memory.Bytes, size)
		}
		if mode == Lazy {
			return memory.NewMapped(size, int(s.memory.Fd()))
		}
		return s.eager(ctx, backing)
	}
	return g, nil
}

// Prefetch begins to read what the guest was writing when the snapshot was made, in the
// background, if the machine's memory was restored lazily. It is for a guest that runs.
func (s *Snapshot) Prefetch(m *machine.Machine) {
	hot := s.hot
	m.Memory().Prefetch(len(hot), func(i int) (first, n uint64) { return hot[i].First, hot[i].Pages })
}

// optional reads a part if there is one.
func (s *Snapshot) optional(name string) ([]byte, error) {
	if !s.has(name) {
		return nil, nil
	}
	return s.part(name)
}

// eager makes memory and reads its content.
func (s *Snapshot) eager(ctx context.Context, backing memory.Backing) (*memory.Memory, error) {
	m, err := memory.New(s.Manifest.Memory.Bytes, backing)
	if err != nil {
		return nil, err
	}
	if err := s.readMemory(ctx, m.Bytes()); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}
