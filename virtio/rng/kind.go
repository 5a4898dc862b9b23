package rng

import (
	"log/slog"

	"github.com/govmm/govmm/virtio"
)

// Kind is the entry of the entropy device in a machine's table of devices.
var Kind = virtio.Kind{
	Name:    "rng",
	Max:     1,
	About:   "entropy device",
	Usage:   "an entropy device",
	Default: true,
	New:     func() virtio.Spec { return new(Spec) },
}

// Spec is the entropy device in a machine's description.
type Spec struct{}

// Kind implements [virtio.Spec].
func (Spec) Kind() string { return Kind.Name }

// String implements [virtio.Spec].
func (Spec) String() string { return Kind.Name }

// Validate implements [virtio.Spec].
func (Spec) Validate() error { return nil }

// Open implements [virtio.Spec].
func (Spec) Open(*slog.Logger) (virtio.Backend, error) { return backend{}, nil }

type backend struct{}

func (backend) Attach(virtio.Guest) (virtio.Device, error) { return New(Config{}), nil }
func (backend) Info() virtio.Info                          { return nil }
func (backend) Close() error                               { return nil }
