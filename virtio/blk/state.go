package blk

import (
	"fmt"

	"github.com/fxamacker/cbor/v2"
)

// stateVersion is counted on when State changes its meaning.
const stateVersion = 1

// State is what of a disk travels with a migration, beside its configuration
// and the content of its image: what the driver has read of it and must find
// again. No requests travel, there are none while it is saved.
type State struct {
	Version   uint32
	Capacity  uint64 // sectors of 512 bytes
	Topology  Topology
	WriteBack bool
}

var (
	encode = must(cbor.CoreDetEncOptions().EncMode())
	decode = must(cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		TagsMd:            cbor.TagsForbidden,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		FieldNameMatching: cbor.FieldNameMatchingCaseSensitive,
	}.DecMode())
)

// must is for the modes above, whose options do not depend on anything.
func must[M any](m M, err error) M {
	if err != nil {
		panic(err)
	}
	return m
}

// SaveState implements [virtio.Device].
func (d *Device) SaveState() ([]byte, error) {
	d.shownMu.Lock()
	s := State{stateVersion, d.image.sectors, d.topology, d.writeBack}
	d.shownMu.Unlock()
	b, err := encode.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("disk %s: encode its state: %w", d.config.Path, err)
	}
	return b, nil
}

// LoadState implements [virtio.Device]. An image of another size is refused.
func (d *Device) LoadState(b []byte) error {
	var s State
	if err := decode.Unmarshal(b, &s); err != nil {
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
	case s.Version != stateVersion:
		return fmt.Errorf("version %d, version %d is known", s.Version, stateVersion)
	case s.Capacity != sectors:
		return fmt.Errorf("%d bytes at the source, %d bytes here", s.Capacity*SectorSize, sectors*SectorSize)
	case !powerOf2(int(t.BlockSize), maxBlock) || t.BlockSize < SectorSize:
		return fmt.Errorf("blocks of %d bytes", t.BlockSize)
	case t.PhysicalExp > 20:
		return fmt.Errorf("2^%d blocks in a physical one", t.PhysicalExp)
	}
	return nil
}
