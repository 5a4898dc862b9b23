package balloon

import (
	"errors"
	"fmt"

	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/mempage"
)

// State is what travels with a migration. Pages that the guest has given back are
// holes in guest memory.
type State struct {
	Target  uint32 `cbor:"target"`  // pages that the host wants the balloon to hold
	Actual  uint32 `cbor:"actual"`  // pages that it holds, as the driver says
	Command uint32 `cbor:"command"` // the free page hint command id that the driver reads
	LastID  uint32 `cbor:"last_id"` // the last id that hints were asked for under; 0: none yet
	Poison  uint32 `cbor:"poison"`  // what the driver expects in free pages
}

var errState = errors.New("balloon state")

// SaveState returns a [State].
func (b *Balloon) SaveState() ([]byte, error) {
	b.config.Lock()
	s := b.state
	b.config.Unlock()
	raw, err := strictcbor.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errState, err)
	}
	return raw, nil
}

// LoadState takes a [State].
func (b *Balloon) LoadState(raw []byte) error {
	var s State
	if err := strictcbor.Unmarshal(raw, &s); err != nil {
		return fmt.Errorf("%w: %w", errState, err)
	}
	if s.Target > 0 && uint64(s.Target)*mempage.Size >= b.cfg.RAM {
		return fmt.Errorf("%w: the target must be less than the guest's %d bytes, got %d pages", errState, b.cfg.RAM, s.Target)
	}
	if s.LastID == CommandDone {
		return fmt.Errorf("%w: the last command id must not be %d", errState, s.LastID)
	}
	b.config.Lock()
	defer b.config.Unlock()
	b.state = s
	return nil
}
