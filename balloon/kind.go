package balloon

import (
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"

	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/virtio"
)

// Kind is the entry of the balloon in a machine's table of devices.
var Kind = virtio.Kind{
	Name:    "balloon",
	Max:     1,
	Usage:   "a memory balloon, with which the guest says what it does not use",
	Default: true,
	New:     func() virtio.Spec { return new(Spec) },
	NewInfo: func() virtio.Info { return new(Info) },
}

// Spec is the balloon in a machine's description.
type Spec struct{}

// Kind implements [virtio.Spec].
func (Spec) Kind() string { return Kind.Name }

// String implements [virtio.Spec].
func (Spec) String() string { return Kind.Name }

// Validate implements [virtio.Spec].
func (Spec) Validate() error { return nil }

// Open implements [virtio.Spec].
func (Spec) Open(*slog.Logger) (virtio.Backend, error) { return &backend{}, nil }

// backend has the balloon of the machine's present life.
type backend struct{ balloon atomic.Pointer[Balloon] }

// Attach makes a balloon. The host's target outlives the guest that it was asked
// of.
func (b *backend) Attach(g virtio.Guest) (virtio.Device, error) {
	next, err := New(Config{Memory: g.Memory, Puncher: g.Memory, RAM: g.Memory.Size(), Log: g.Log})
	if err != nil {
		return nil, err
	}
	if before := b.balloon.Load(); before != nil {
		if err := next.SetTarget(before.Target()); err != nil {
			return nil, err
		}
	}
	b.balloon.Store(next)
	return next, nil
}

// Info describes a memory balloon, in bytes.
type Info struct {
	// Target is how much of the guest's memory the balloon is to hold, Actual how
	// much it holds according to the guest.
	Target uint64 `json:"target"`
	Actual uint64 `json:"actual"`
	// Stats are the statistics that the guest's driver gave last; nil: none yet.
	Stats *Stats `json:"stats,omitempty"`
}

// Lines implements [virtio.Info].
func (i *Info) Lines() []string {
	lines := []string{fmt.Sprintf("target %s, holds %s", units.Bytes(i.Target), units.Bytes(i.Actual))}
	if i.Stats != nil {
		var stats []string
		for _, row := range i.Stats.Rows() {
			stats = append(stats, row[0]+" "+row[1])
		}
		lines = append(lines, "the guest: "+strings.Join(stats, ", "))
	}
	return lines
}

// Info describes the balloon. It does not wait for the guest.
func (b *Balloon) Info() Info {
	i := Info{Target: b.Target(), Actual: b.Actual()}
	if s, ok := b.Stats(); ok {
		i.Stats = &s
	}
	return i
}

func (b *backend) Info() virtio.Info {
	i := b.balloon.Load().Info()
	return &i
}

func (b *backend) Close() error { return nil }
