package balloon

import (
	"errors"
	"fmt"

	"github.com/fxamacker/cbor/v2"
	"github.com/govmm/govmm/mempage"
)

// State is what travels with a migration. What the guest has given back is in
// guest memory, as holes.
type State struct {
	Target  uint32 // pages that the balloon shall hold
	Actual  uint32 // pages that it holds, as the driver has it
	Command uint32 // the free page hint command id that the driver reads
	LastID  uint32 // the last id that hints were asked for under; 0: none yet
	Poison  uint32 // what the driver expects in free pages
}

var errState = errors.New("balloon state")

var stateDecoder = func() cbor.DecMode {
	m, err := cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
		FieldNameMatching: cbor.FieldNameMatchingCaseSensitive,
	}.DecMode()
	if err != nil {
		panic(err)
	}
	return m
}()

// SaveState returns a [State].
func (b *Balloon) SaveState() ([]byte, error) {
	b.config.Lock()
	s := b.state
	b.config.Unlock()
	raw, err := cbor.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errState, err)
	}
	return raw, nil
}

// LoadState takes a [State].
func (b *Balloon) LoadState(raw []byte) error {
	var s State
	if err := stateDecoder.Unmarshal(raw, &s); err != nil {
		return fmt.Errorf("%w: %w", errState, err)
	}
	if s.Target > 0 && uint64(s.Target)*mempage.Size >= b.cfg.RAM {
		return fmt.Errorf("%w: target of %d pages in a guest of %d bytes", errState, s.Target, b.cfg.RAM)
	}
	if s.LastID == CommandDone {
		return fmt.Errorf("%w: last command id %d", errState, s.LastID)
	}
	b.config.Lock()
	defer b.config.Unlock()
	b.state = s
	return nil
}
