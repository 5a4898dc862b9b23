package vmm_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm"
)

// A kind of device in two versions. The older one has a brightness; the newer one
// has a colour as well, which is a feature while it is not the zero value.

type lampState struct {
	Brightness int `cbor:"brightness"`
}

type newerLampState struct {
	Brightness int    `cbor:"brightness"`
	Colour     string `cbor:"colour,omitzero"`
}

// lamp is the device of both versions.
type lamp struct {
	newer bool
	state newerLampState
}

func (l *lamp) ID() uint16                                              { return 62 }
func (l *lamp) Features() uint64                                        { return 0 }
func (l *lamp) QueueSizes() []uint16                                    { return []uint16{8} }
func (l *lamp) ReadConfig(uint32, []byte)                               {}
func (l *lamp) WriteConfig(uint32, []byte)                              {}
func (l *lamp) Activate(uint64, []*virtio.Queue, virtio.Notifier) error { return nil }
func (l *lamp) ResetQueue(*virtio.Queue)                                {}
func (l *lamp) Reset()                                                  {}
func (l *lamp) Pause(context.Context) error                             { return nil }
func (l *lamp) Resume() error                                           { return nil }

func (l *lamp) SaveState() ([]byte, error) {
	if l.newer {
		return strictcbor.Marshal(l.state)
	}
	return strictcbor.Marshal(lampState{l.state.Brightness})
}

func (l *lamp) LoadState(b []byte) error {
	if l.newer {
		return strictcbor.Unmarshal(b, &l.state)
	}
	var s lampState
	err := strictcbor.Unmarshal(b, &s)
	l.state.Brightness = s.Brightness
	return err
}

// FeaturesInUse implements virtio.Featured.
func (l *lamp) FeaturesInUse() []string {
	if l.state.Colour != "" {
		return []string{"colour"}
	}
	return nil
}

// lampSpec is the device in a description, and its own backend.
type lampSpec struct {
	Bulbs int `cbor:"bulbs"`

	lamp *lamp
}

func (s *lampSpec) Kind() string                               { return "lamp" }
func (s *lampSpec) String() string                             { return "lamp" }
func (s *lampSpec) Validate() error                            { return nil }
func (s *lampSpec) Open(*slog.Logger) (virtio.Backend, error)  { return s, nil }
func (s *lampSpec) Attach(virtio.Guest) (virtio.Device, error) { return s.lamp, nil }
func (s *lampSpec) Info() virtio.Info                          { return nil }
func (s *lampSpec) Close() error                               { return nil }

// lamps is the kind of a host with one version or the other; the lamp of a guest
// that arrives is to be arrived.
func lamps(newer bool, arrived *lamp) virtio.Kind {
	k := virtio.Kind{Name: "lamp", Max: 1, New: func() virtio.Spec {
		arrived.newer = newer
		return &lampSpec{lamp: arrived}
	}}
	if newer {
		k.Features = []string{"colour"}
	}
	return k
}

// TestVersionsThatDiffer: a guest moves between a host whose govmm knows a field of
// saved state and one whose does not, both ways. What the older one does not know
// is refused by its name, before memory is sent, if this guest uses it.
func TestVersionsThatDiffer(t *testing.T) {
	testenv.NeedKVM(t)
	for _, c := range []struct {
		name     string
		from, to bool // newer
		state    newerLampState
		refused  string
	}{
		{"newer to older, not in use", true, false, newerLampState{Brightness: 5}, ""},
		{"newer to older, in use", true, false, newerLampState{5, "red"},
			`the guest uses features that this version of govmm does not know: "lamp/colour"`},
		{"older to newer", false, true, newerLampState{Brightness: 5}, ""},
		{"newer to newer, in use", true, true, newerLampState{5, "red"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), testenv.Patience)
			defer cancel()
			serial := &firstOutput{wrote: make(chan struct{})}
			source, err := vmm.NewVM(vmm.Config{Memory: 64 << 20, Serial: serial,
				Kinds: []virtio.Kind{lamps(c.from, new(lamp))}, Devices: []virtio.Spec{&lampSpec{Bulbs: 3, lamp: &lamp{c.from, c.state}}}})
			testenv.Check(t, err)
			left := run(source)
			t.Cleanup(func() { _ = source.Stop(context.Background()); <-left })
			<-serial.wrote

			listener, err := net.Listen("tcp", "127.0.0.1:0")
			testenv.Check(t, err)
			var arrived lamp
			destination, err := vmm.NewReceiver(vmm.ReceiveConfig{Listener: listener, Kinds: []virtio.Kind{lamps(c.to, &arrived)}})
			testenv.Check(t, err)
			ended := run(destination)
			t.Cleanup(func() { _ = destination.Stop(context.Background()); <-ended })

			result, err := source.Migrate(ctx, listener.Addr().String(), migrate.Options{})
			if c.refused != "" {
				if !errors.Is(err, migrate.ErrRefused) || !strings.Contains(err.Error(), c.refused) {
					t.Errorf("error %v, want a refusal with %q", err, c.refused)
				}
				if result.PagesSent != 0 || source.Info().State != vmm.StateRunning {
					t.Errorf("%d pages were sent, and the source is %s", result.PagesSent, source.Info().State)
				}
				return
			}
			testenv.Check(t, err)
			// Info orders what the destination loaded before what is read here.
			if s := destination.Info().State; s != vmm.StateRunning {
				t.Errorf("the destination is %s", s)
			}
			if arrived.state != c.state {
				t.Errorf("the lamp arrived as %+v, it was %+v", arrived.state, c.state)
			}
		})
	}
}
