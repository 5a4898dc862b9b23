package simtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"

	"github.com/govmm/govmm/migrate"
)

// World holds the machines of one guest: the source on which it began and every
// destination that it was sent to. It checks that at most one of them runs, and compares
// the memory of both sides whenever the guest arrives.
type World struct {
	// Unchecked leaves the comparison out, which would be part of the downtime and
	// takes longer than it. It is set before the world is used.
	Unchecked bool

	mu       sync.Mutex // guards the fields below
	machines []*Machine
	holder   *Machine // ran the guest last, or has it stopped
	running  map[*Machine]bool
	arrivals int
	losses   []Loss
	wrongs   []error
}

// NewWorld makes a world without machines.
func NewWorld() *World { return &World{running: map[*Machine]bool{}} }

// Arrivals is how often a destination got the right to run.
func (w *World) Arrivals() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.arrivals
}

// Holder is the machine that the guest is on.
func (w *World) Holder() *Machine {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.holder
}

// Machines lists the machines in the order in which they were made.
func (w *World) Machines() []*Machine {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]*Machine(nil), w.machines...)
}

// Err returns all that went wrong in this world: two machines that ran at one time, pages
// that differed at an arrival.
func (w *World) Err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	errs := append([]error(nil), w.wrongs...)
	for _, l := range w.losses {
		errs = append(errs, fmt.Errorf("lost page: %v", l))
	}
	return errors.Join(errs...)
}

// Close stops every machine and frees its memory. Receivers that use them must have
// ended.
func (w *World) Close() {
	closed := map[*Memory]bool{} // machines may share one
	for _, m := range w.Machines() {
		m.stop()
	}
	for _, m := range w.Machines() {
		if !closed[m.Memory] {
			closed[m.Memory] = true
			m.Close()
		}
	}
}

func (w *World) add(m *Machine) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.machines = append(w.machines, m)
	if w.holder == nil {
		w.holder = m
	}
}

// runs records that a machine's vCPUs enter the guest, or have left it.
func (w *World) runs(m *Machine, runs bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !runs {
		delete(w.running, m)
		return
	}
	w.running[m] = true
	if len(w.running) > 1 {
		w.wrongs = append(w.wrongs, fmt.Errorf("%d machines run one guest", len(w.running)))
	}
}

// arrived compares the memories; neither machine runs.
func (w *World) arrived(m *Machine) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.running[w.holder] {
		w.wrongs = append(w.wrongs, errors.New("the guest arrived while it ran at the source"))
	} else if !w.Unchecked {
		w.losses = append(w.losses, Compare(w.holder.Memory, m.Memory)...)
		for i, d := range m.disks {
			if err := d.differs(w.holder.disks[i]); err != nil {
				w.wrongs = append(w.wrongs, err)
			}
		}
	}
	w.holder = m
	w.arrivals++
}

// Builder makes destinations of a world. It implements [migrate.Builder].
type Builder struct {
	World *World
	// Refuse lists why no machine can be built here, nil to build it.
	Refuse []error
	// Steps are those of every machine that is built.
	Steps Steps
	// Storage is what they reach, see [Machine].
	Storage string
	// SharedDisks is how many disks, the first ones, the machines share with the source.
	SharedDisks int
}

var _ migrate.Builder = (*Builder)(nil)

// Build implements [migrate.Builder].
func (b *Builder) Build(ctx context.Context, config []byte) (migrate.Target, error) {
	if len(b.Refuse) > 0 {
		return nil, errors.Join(b.Refuse...)
	}
	var c Config
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, fmt.Errorf("read the configuration of a simulated machine: %w", err)
	}
	m, err := newMachine(b.World, c)
	if err != nil {
		return nil, err
	}
	m.Steps, m.Storage = b.Steps, b.Storage
	if err := m.shareDisks(b.World.Holder(), b.SharedDisks); err != nil {
		return nil, err
	}
	return m, ctx.Err()
}
