package machine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/transport"
)

// devices are the virtio devices of a machine.
type devices struct {
	// quietMu is held over each hold and release of the gate, and guards isQuiet, arrived
	// and the place of backends. It is taken before the gate's locks.
	quietMu sync.Mutex
	isQuiet bool // the devices are paused
	arrived bool // the right to run has come here, or was given away, and the guest has not run since

	plugged   []plugged        // does not change once the machine is made
	backends  backends         // the machine's to close; empty after a reset took them
	shown     []virtio.Backend // the same, for Info: does not change
	unplugged bool             // plugged has been closed
}

// plugged is a virtio device on the bus.
type plugged struct {
	*transport.Transport
	name string
}

// createDevices makes the PCI bus and plugs in a device for each backend.
func (m *Machine) createDevices() error {
	m.devices.shown = m.devices.backends.all
	b := &m.board
	b.pci = pci.NewBus()
	for _, c := range []struct {
		bus      *Bus
		first, n uint64
		region   pci.Region
	}{
		{&b.mmio, pci.ECAMBase, pci.ECAMSize, b.pci.ECAM()},
		{&b.mmio, pci.MMIOBase, pci.MMIOSize, b.pci.MMIO()},
		{&b.ports, pci.ConfigPorts, pci.ConfigPortCount, b.pci.Ports(&resetControl{end: m.end, value: &m.resetControl})},
	} {
		if err := c.bus.Claim(c.first, c.n, c.region); err != nil {
			return err
		}
	}
	for i, backend := range m.devices.shown {
		name := m.spec.Devices[i].String()
		log := m.log.With("device", name)
		d, err := backend.Attach(virtio.Guest{Memory: m.mem, Console: m.ends.Console, Log: log})
		if err == nil {
			err = m.plug(name, d, log)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// plug puts a device into the next slot.
func (m *Machine) plug(name string, d virtio.Device, log *slog.Logger) error {
	t, err := transport.New(d, transport.Host{
		Memory: m.mem, Interrupts: m.board.interrupts, Notifications: m.board.interrupts,
		Log: log,
	})
	if err != nil {
		return err
	}
	m.devices.plugged = append(m.devices.plugged, plugged{t, name}) // closed with the machine from now on
	if f, ok := d.(virtio.Feeder); ok {
		m.lines.feeds = append(m.lines.feeds, &feed{name: name, serve: f.Feed})
	}
	if f, ok := d.(virtio.Drainer); ok {
		m.lines.drainers = append(m.lines.drainers, f)
	}
	_, err = m.board.pci.Add(0, t.Function())
	return err
}

// deviceOf returns the first of a machine's devices that is a T.
func deviceOf[T any](m *Machine) (t T, ok bool) {
	for _, d := range m.devices.plugged {
		if t, ok = d.Device().(T); ok {
			return t, true
		}
	}
	return t, false
}

// quietTime bounds how long the devices may take to finish the requests that
// they have begun when the vCPUs stop. The guest stands still meanwhile.
const quietTime = 5 * time.Second

// pause finishes what the devices have begun and lets them begin nothing more.
// The vCPUs have stopped. After an error all devices run. quietMu is held.
func (d *devices) pause(ctx context.Context) error {
	if d.isQuiet {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, quietTime)
	defer cancel()
	for i, p := range d.plugged {
		if err := p.Pause(ctx); err != nil {
			err = fmt.Errorf("%s: %w", p.name, err)
			for _, before := range d.plugged[:i] {
				err = errors.Join(err, before.Resume())
			}
			return err
		}
	}
	d.isQuiet = true
	return nil
}

// resume undoes pause, just before the vCPUs run. The driver of a device that cannot
// go on learns that it needs a reset. quietMu is held.
func (d *devices) resume(log *slog.Logger) {
	if !d.isQuiet {
		return
	}
	d.isQuiet = false
	for _, p := range d.plugged {
		if err := p.Resume(); err != nil {
			log.Error("the device needs a reset", "device", p.name, "err", err)
		}
	}
	if d.arrived {
		d.arrived = false
		d.backends.announce()
	}
}

// unplug gives everything back but the backends. The vCPUs have stopped.
func (d *devices) unplug(at *step) error {
	if d.unplugged {
		return nil
	}
	d.unplugged = true
	var errs []error
	for _, p := range d.plugged {
		at.begin(p.name + ": the requests that it has begun")
		if err := p.Close(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", p.name, err))
		}
	}
	return errors.Join(errs...)
}

// virtioState is what of the PCI bus and of the devices on it travels.
type virtioState struct {
	Bus     pci.BusState      `cbor:"bus"`
	Devices []transport.State `cbor:"devices"` // in the order of their slots
}

// saveDevices returns the state of the devices, which are quiet.
func (m *Machine) saveDevices() (s virtioState, err error) {
	s.Bus = m.board.pci.SaveState()
	for _, d := range m.devices.plugged {
		state, err := d.SaveState()
		if err != nil {
			return s, fmt.Errorf("%s: %w", d.name, err)
		}
		s.Devices = append(s.Devices, state)
	}
	return s, nil
}

// loadDevices puts the devices into a saved state; they stay quiet.
func (m *Machine) loadDevices(s *virtioState) error {
	if got, want := len(s.Devices), len(m.devices.plugged); got != want {
		return kind.Told(fmt.Errorf("machine state: expected %d devices, found %d", want, got))
	}
	if err := m.board.pci.LoadState(s.Bus); err != nil {
		return fmt.Errorf("PCI bus: %w", err)
	}
	m.devices.isQuiet, m.devices.arrived = true, true
	for i, d := range m.devices.plugged {
		if err := d.LoadState(s.Devices[i]); err != nil {
			return kind.Hidden(fmt.Errorf("%s: %w", d.name, err), "device %d (%s): this host cannot load its state", i+1, m.spec.Devices[i].Kind())
		}
	}
	return nil
}
