package simtest

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/govmm/govmm/migrate"
)

// Sharing is a [Builder] whose machines can also be made in the memory of the machine that
// holds the guest. It implements [migrate.Sharer].
type Sharing struct{ Builder }

var _ migrate.Sharer = (*Sharing)(nil)

// BuildShared implements [migrate.Sharer].
func (b *Sharing) BuildShared(ctx context.Context, config []byte) (migrate.Target, error) {
	var c Config
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, fmt.Errorf("read the configuration of a simulated machine: %w", err)
	}
	m, err := newMachineIn(b.World, c, b.World.Holder().Memory)
	if err != nil {
		return nil, err
	}
	m.Steps, m.Storage = b.Steps, b.Storage
	return &sharedTarget{m, b.World}, ctx.Err()
}

// sharedTarget reports what writes the memory, which is the source's.
type sharedTarget struct {
	*Machine
	world *World
}

func (t *sharedTarget) wrong(what string) error {
	err := fmt.Errorf("%s of memory that is shared", what)
	t.world.mu.Lock()
	defer t.world.mu.Unlock()
	t.world.wrongs = append(t.world.wrongs, err)
	return err
}

// Zero implements [migrate.RAM].
func (t *sharedTarget) Zero(int, uint64, uint64) error { return t.wrong("Zero") }

// Prefault implements [migrate.Target].
func (t *sharedTarget) Prefault(int, uint64, uint64) error { return t.wrong("Prefault") }
