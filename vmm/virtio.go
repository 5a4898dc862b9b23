package vmm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/console"
	"github.com/govmm/govmm/virtio/rng"
	"github.com/govmm/govmm/virtio/transport"
)

// VirtioState is what of the PCI bus and of the devices on it travels.
type VirtioState struct {
	Bus     pci.BusState
	Devices []transport.State // in the order of their slots
}

// plugged is a virtio device on the bus.
type plugged struct {
	*transport.Transport
	name string
}

// createDevices makes the PCI bus and plugs in what the spec has, with what
// b has opened for it.
func (m *Machine) createDevices(b *backends) error {
	m.shown = backends{disks: slices.Clone(b.disks), nets: slices.Clone(b.nets), taps: slices.Clone(b.taps)}
	m.bus = pci.NewBus()
	for _, c := range []struct {
		bus      *Bus
		first, n uint64
		region   pci.Region
	}{
		{&m.mmio, pci.ECAMBase, pci.ECAMSize, m.bus.ECAM()},
		{&m.mmio, pci.MMIOBase, pci.MMIOSize, m.bus.MMIO()},
		{&m.ports, pci.ConfigPorts, pci.ConfigPortCount, m.bus.Ports(&resetControl{end: m.end, value: &m.resetControl})},
	} {
		if err := c.bus.Claim(c.first, c.n, c.region); err != nil {
			return err
		}
	}
	d := &m.spec.Devices
	if d.Balloon {
		dev, err := balloon.New(balloon.Config{Memory: m.mem, Puncher: m.mem, RAM: m.mem.Size(), Log: slog.New(lineHandler{logf: m.logf})})
		if err != nil {
			return err
		}
		m.balloon = dev
		if err := m.plug("balloon", dev, 0); err != nil {
			return err
		}
	}
	if d.RNG {
		if err := m.plug("rng", rng.New(rng.Config{}), 0); err != nil {
			return err
		}
	}
	if d.Console {
		if err := m.plugConsole(); err != nil {
			return err
		}
	}
	for i, disk := range b.disks {
		if err := m.plug("disk "+d.Disks[i].Path, lent{disk}, 0); err != nil {
			return err
		}
	}
	for i, n := range b.nets {
		// The guest is offered here what it was offered where it was started.
		if err := m.plug("net "+d.Nets[i].MAC.String(), lent{n}, n.Features()&^d.Nets[i].Features); err != nil {
			return err
		}
	}
	if b.vsock != nil {
		if err := m.plug(fmt.Sprintf("vsock cid %d", d.Vsock.GuestCID()), lent{b.vsock}, 0); err != nil {
			return err
		}
	}
	return nil
}

// plug puts a device into the next slot; without are features of it that the
// guest is not offered.
func (m *Machine) plug(name string, dev virtio.Device, without uint64) error {
	t, err := transport.New(dev, transport.Host{
		Memory: m.mem, Interrupts: m.interrupts, Notifications: m.interrupts, Without: without,
		Log: slog.New(lineHandler{logf: m.logf}).With("device", name),
	})
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	m.plugged = append(m.plugged, plugged{t, name}) // closed with the machine from now on
	if _, err := m.bus.Add(0, t.Function()); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// plugConsole makes hvc0, whose other end is the second of the machine's ends.
func (m *Machine) plugConsole() error {
	m.hvc = console.New(console.Config{}, m.ends.Console)
	m.feeds = append(m.feeds, &feed{what: "console", serve: func(ctx context.Context) error { return m.hvc.Serve(ctx, m.ends.Console) }})
	return m.plug("console", m.hvc, 0)
}

// quietTime bounds how long the devices may take to finish the requests that
// they have begun when the vCPUs stop. The guest stands still meanwhile.
const quietTime = 5 * time.Second

// quiet finishes what the devices have begun and lets them begin nothing more.
// The vCPUs have stopped. After an error all goes on. quietMu is held.
func (m *Machine) quiet(ctx context.Context) error {
	if m.isQuiet {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, quietTime)
	defer cancel()
	for i, d := range m.plugged {
		if err := d.Pause(ctx); err != nil {
			err = fmt.Errorf("%s: %w", d.name, err)
			for _, p := range m.plugged[:i] {
				err = errors.Join(err, p.Resume())
			}
			return err
		}
	}
	m.isQuiet = true
	return nil
}

// wake undoes quiet, just before the vCPUs run. A device that cannot go on has
// told its driver. quietMu is held.
func (m *Machine) wake() {
	if !m.isQuiet {
		return
	}
	m.isQuiet = false
	for _, d := range m.plugged {
		if err := d.Resume(); err != nil {
			m.logf("%s: %v", d.name, err)
		}
	}
	if m.arrived {
		m.arrived = false
		m.backends.announce()
	}
}

// saveDevices returns the state of the devices, which are quiet.
func (m *Machine) saveDevices() (s VirtioState, err error) {
	s.Bus = m.bus.SaveState()
	for _, d := range m.plugged {
		state, err := d.SaveState()
		if err != nil {
			return s, fmt.Errorf("%s: %w", d.name, err)
		}
		s.Devices = append(s.Devices, state)
	}
	return s, nil
}

// loadDevices puts the devices into the state of their twins; they stay quiet.
func (m *Machine) loadDevices(s *VirtioState) error {
	if len(s.Devices) != len(m.plugged) {
		return fmt.Errorf("machine state of %d devices: the machine has %d", len(s.Devices), len(m.plugged))
	}
	if err := m.bus.LoadState(s.Bus); err != nil {
		return fmt.Errorf("PCI bus: %w", err)
	}
	m.isQuiet, m.arrived = true, true
	for i, d := range m.plugged {
		if err := d.LoadState(s.Devices[i]); err != nil {
			return fmt.Errorf("%s: %w", d.name, err)
		}
	}
	return nil
}

// unplug gives everything back but the backends. The vCPUs have stopped.
func (m *Machine) unplug() error {
	var errs []error
	for _, d := range m.plugged {
		if err := d.Close(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", d.name, err))
		}
	}
	m.plugged = nil
	return errors.Join(errs...)
}
