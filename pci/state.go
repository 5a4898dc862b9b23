package pci

import (
	"encoding/binary"
	"fmt"
)

// FunctionState is the state of a function that a migration sends: the
// configuration space, which includes the BARs' addresses, and the MSI-X table.
type FunctionState struct {
	Config []byte `cbor:"config"`
	// Table and Pending are empty without MSI-X.
	Table   []byte   `cbor:"msix_table"`
	Pending []uint64 `cbor:"msix_pending"`
}

// BusState is the state of the bus and its host bridge, without other functions.
type BusState struct {
	Address uint32        `cbor:"address"` // port 0xcf8
	Bridge  FunctionState `cbor:"bridge"`
}

// SaveState returns the function's state. The vCPUs must be stopped.
func (f *Function) SaveState() FunctionState {
	f.space.Lock()
	s := FunctionState{Config: append([]byte(nil), f.config[:]...)}
	f.space.Unlock()
	if m := f.msix; m != nil {
		m.table.RLock()
		defer m.table.RUnlock()
		m.pendingMu.Lock()
		defer m.pendingMu.Unlock()
		s.Table = append(s.Table, m.entries...)
		s.Pending = append(s.Pending, m.pending...)
	}
	return s
}

// LoadState loads a saved state, maps the BARs and sends what is pending. If it
// fails, the state is of another kind of function, and nothing has changed.
// Suspend MSI-X before ([MSIX.Suspend]) if the interrupt controllers are not loaded
// yet.
func (f *Function) LoadState(s FunctionState) error {
	if len(s.Config) != configSize {
		return fmt.Errorf("PCI function state: expected a configuration space of %d bytes, found %d", configSize, len(s.Config))
	}
	m := f.msix
	if m == nil && (len(s.Table) != 0 || len(s.Pending) != 0) {
		return fmt.Errorf("PCI function state has MSI-X, the function does not")
	}
	if m != nil {
		if len(s.Table) != len(m.entries) || len(s.Pending) != len(m.pending) {
			return fmt.Errorf("PCI function state: expected an MSI-X table of %d bytes and %d words of pending bits, found %d and %d",
				len(m.entries), len(m.pending), len(s.Table), len(s.Pending))
		}
		if beyond := m.Vectors() % 64; beyond != 0 && s.Pending[len(s.Pending)-1]>>beyond != 0 {
			return fmt.Errorf("PCI function state: interrupts beyond the %d vectors are pending", m.Vectors())
		}
		for i := range m.Vectors() {
			if control := binary.LittleEndian.Uint32(s.Table[i*entrySize+entryControl:]); control&^entryMasked != 0 {
				return fmt.Errorf("PCI function state: MSI-X vector %d: vector control must be 0 or %d, found %#x", i, entryMasked, control)
			}
		}
	}
	f.space.Lock()
	defer f.space.Unlock()
	for i, v := range s.Config {
		if diff := (v ^ f.config[i]) &^ f.writable[i]; diff != 0 {
			return fmt.Errorf("PCI function state: byte %#x of the configuration space: expected %#x, found %#x", i, f.config[i], v)
		}
	}
	copy(f.config[:], s.Config)
	f.decode()
	if m != nil {
		m.load(s)
	}
	return nil
}

func (m *MSIX) load(s FunctionState) {
	m.table.Lock()
	defer m.table.Unlock()
	copy(m.entries, s.Table)
	m.pendingMu.Lock()
	copy(m.pending, s.Pending)
	m.pendingMu.Unlock()
	control := binary.LittleEndian.Uint16(s.Config[m.at:])
	m.enabled, m.masked = control&controlEnable != 0, control&controlMask != 0
	m.update(0, m.Vectors())
}

// SaveState returns the bus's state. The vCPUs must be stopped.
func (b *Bus) SaveState() BusState {
	return BusState{Address: b.address.Load(), Bridge: b.functions[0].SaveState()}
}

// LoadState loads a saved state.
func (b *Bus) LoadState(s BusState) error {
	if s.Address&^addressMask != 0 {
		return fmt.Errorf("PCI bus state: address register %#x has reserved bits", s.Address)
	}
	if err := b.functions[0].LoadState(s.Bridge); err != nil {
		return fmt.Errorf("host bridge: %w", err)
	}
	b.address.Store(s.Address)
	return nil
}
