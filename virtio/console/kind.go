package console

import (
	"context"
	"log/slog"

	"github.com/govmm/govmm/virtio"
)

// Kind is the entry of the console in a machine's table of devices.
var Kind = virtio.Kind{
	Name:  "console",
	Max:   1,
	About: "hvc0",
	New:   func() virtio.Spec { return new(Spec) },
}

// Spec is the console in a machine's description. Its other end is not part of
// it: see [virtio.Guest].
type Spec struct{}

// Kind implements [virtio.Spec].
func (Spec) Kind() string { return Kind.Name }

// String implements [virtio.Spec].
func (Spec) String() string { return Kind.Name }

// Validate implements [virtio.Spec].
func (Spec) Validate() error { return nil }

// Open implements [virtio.Spec].
func (Spec) Open(*slog.Logger) (virtio.Backend, error) { return &backend{}, nil }

// backend has the console of the machine's present life.
type backend struct{ device *Device }

func (b *backend) Attach(g virtio.Guest) (virtio.Device, error) {
	err := b.Close()
	b.device = New(Config{}, g.Console)
	return fed{b.device, g.Console}, err
}

func (b *backend) Info() virtio.Info { return nil }

func (b *backend) Close() error {
	if b.device == nil {
		return nil
	}
	return b.device.Close()
}

// fed is a console with where its input comes from.
type fed struct {
	*Device
	from virtio.Console
}

// Feed implements [virtio.Feeder].
func (f fed) Feed(ctx context.Context) error { return f.Serve(ctx, f.from) }
