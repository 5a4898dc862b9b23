package blk

import (
	"fmt"

	"github.com/govmm/govmm/internal/strictcbor"
)

// State is what of a disk travels with a migration, beside its configuration
// and the content of its image: what the driver has read and must find again.
// No requests travel: none are under way when it is saved.
type State struct {
	Capacity  uint64   `cbor:"capacity"` // sectors of 512 bytes
	Topology  Topology `cbor:"topology"`
	WriteBack bool     `cbor:"write_back"`
}

// SaveState implements [virtio.Device].
func (d *Device) SaveState() ([]byte, error) {
	d.shownMu.Lock()
	s := State{d.image.sectors, d.topology, d.writeBack}
	d.shownMu.Unlock()
	b, err := strictcbor.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("disk %s: encode its state: %w", d.config.Path, err)
	}
	return b, nil
}

// LoadState implements [virtio.Device]. An image of another size is refused.
func (d *Device) LoadState(b []byte) error {
	var s State
	if err := strictcbor.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("disk %s: decode its state: %w", d.config.Path, err)
	}
	if err := s.check(d.image.sectors); err != nil {
		return fmt.Errorf("disk %s: its state: %w", d.config.Path, err)
	}
	d.shownMu.Lock()
	defer d.shownMu.Unlock()
	d.topology, d.writeBack = s.Topology, s.WriteBack
	return nil
}

func (s *State) check(sectors uint64) error {
	t := &s.Topology
	switch {
	case s.Capacity != sectors:
		return fmt.Errorf("%d bytes at the source, %d bytes here", s.Capacity*SectorSize, sectors*SectorSize)
	case !powerOf2(int(t.BlockSize), maxBlock) || t.BlockSize < SectorSize:
		return fmt.Errorf("blocks of %d bytes", t.BlockSize)
	case t.PhysicalExp > 20:
		return fmt.Errorf("2^%d blocks in a physical one", t.PhysicalExp)
	}
	return nil
}
