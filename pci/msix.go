package pci

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"sync"
)

// Interrupts delivers messages to the guest: with KVM, KVM_SIGNAL_MSI.
type Interrupts interface {
	// SignalMSI sends a message, a device's write of data to address. When it returns,
	// the interrupt is in the guest's interrupt controllers. A message that names none of
	// them is lost, as on a bus.
	SignalMSI(address uint64, data uint32) error
}

const (
	// maxVectors is the largest size of an MSI-X table.
	maxVectors = 2048

	entrySize    = 16
	entryControl = 12 // vector control: bit 0 masks
	entryMasked  = 1

	controlEnable   = 1 << 15
	controlMask     = 1 << 14 // of the whole function
	controlWritable = controlEnable | controlMask
)

// MSIX is a function's message-signalled interrupts (PCI 3.0, section 6.8.2): a
// table of messages and a pending bit array, both in one BAR. A message of a masked
// vector is pending until the guest unmasks the vector.
type MSIX struct {
	function *Function
	irqs     Interrupts
	report   func(error)
	at       int    // offset of the message control in the configuration space
	pba      uint64 // offset of the pending bit array in the BAR

	// table guards all fields below. Raise holds it for reading; the guest's
	// and the machine's changes hold it for writing.
	table     sync.RWMutex
	enabled   bool
	masked    bool // the function
	suspended bool
	entries   []byte

	pendingMu sync.Mutex // guards pending; taken after table
	pending   []uint64
}

// AddMSIX adds MSI-X with n vectors to the function, in BAR index. It calls report
// with errors of later calls, because the guest gets no answer to them.
func (f *Function) AddMSIX(index, n int, irqs Interrupts, report func(error)) (*MSIX, error) {
	if n < 1 || n > maxVectors {
		return nil, fmt.Errorf("MSI-X: number of vectors must be between 1 and %d, got %d", maxVectors, n)
	}
	m := &MSIX{function: f, irqs: irqs, report: report, entries: make([]byte, n*entrySize), pending: make([]uint64, (n+63)/64)}
	for i := range n {
		m.entries[i*entrySize+entryControl] = entryMasked
	}
	m.pba = uint64(n*entrySize+4095) &^ 4095 // in another page, as section 6.8.2 recommends
	size := uint64(1) << bits.Len64(m.pba+uint64(len(m.pending)*8)-1)
	if err := f.AddBAR(index, BAR{Size: size, Region: m}); err != nil {
		return nil, fmt.Errorf("MSI-X: %w", err)
	}
	data := binary.LittleEndian.AppendUint16(nil, uint16(n-1))
	data = binary.LittleEndian.AppendUint32(data, uint32(index))
	data = binary.LittleEndian.AppendUint32(data, uint32(m.pba)|uint32(index))
	mask := make([]byte, len(data))
	binary.LittleEndian.PutUint16(mask, controlWritable)
	m.at = f.end + 2
	err := f.AddCapability(Capability{ID: capMSIX, Data: data, Writable: mask, AfterWrite: func(data []byte, _, _ int) {
		m.setControl(binary.LittleEndian.Uint16(data))
	}})
	if err != nil {
		return nil, err
	}
	f.msix = m
	return m, nil
}

// Vectors returns the size of the table.
func (m *MSIX) Vectors() int { return len(m.entries) / entrySize }

// Raise sends the message of a vector, or makes it pending. It does nothing if the
// vector is not in the table or MSI-X is off.
func (m *MSIX) Raise(i int) {
	m.table.RLock()
	defer m.table.RUnlock()
	if i < 0 || i >= m.Vectors() || !m.enabled {
		return
	}
	if m.holds(i) {
		m.setPending(i, true)
		return
	}
	m.send(i)
}

// send sends the message that entry i describes. If the host cannot, it is pending. The
// caller holds table.
func (m *MSIX) send(i int) {
	e := m.entries[i*entrySize:]
	if err := m.irqs.SignalMSI(binary.LittleEndian.Uint64(e), binary.LittleEndian.Uint32(e[8:])); err != nil {
		m.setPending(i, true)
		m.report(fmt.Errorf("MSI-X vector %d: the guest does not get its interrupt: %w", i, err))
	}
}

// holds returns whether the vector's messages stay pending. The caller holds table.
func (m *MSIX) holds(i int) bool {
	return m.suspended || m.masked || m.entries[i*entrySize+entryControl]&entryMasked != 0
}

// setPending sets or clears a pending bit, and returns its old value.
func (m *MSIX) setPending(i int, on bool) bool {
	m.pendingMu.Lock()
	defer m.pendingMu.Unlock()
	word, bit := &m.pending[i/64], uint64(1)<<(i%64)
	was := *word&bit != 0
	if on {
		*word |= bit
	} else {
		*word &^= bit
	}
	return was
}

// ClearPending drops all pending messages. Call it when their causes are gone.
func (m *MSIX) ClearPending() {
	m.pendingMu.Lock()
	defer m.pendingMu.Unlock()
	clear(m.pending)
}

// setControl handles a write of the message control word.
func (m *MSIX) setControl(control uint16) {
	m.table.Lock()
	defer m.table.Unlock()
	m.enabled, m.masked = control&controlEnable != 0, control&controlMask != 0
	m.update(0, m.Vectors())
}

// Read implements [Region]: the guest reads the table or the pending bits.
func (m *MSIX) Read(off uint64, p []byte) {
	m.table.RLock()
	defer m.table.RUnlock()
	clear(p)
	if off < uint64(len(m.entries)) {
		copy(p, m.entries[off:])
		return
	}
	m.pendingMu.Lock()
	defer m.pendingMu.Unlock()
	for i := range p {
		if byteAt := off + uint64(i) - m.pba; off >= m.pba && byteAt < uint64(len(m.pending)*8) {
			p[i] = byte(m.pending[byteAt/8] >> (byteAt % 8 * 8))
		}
	}
}

// Write implements [Region]: the guest writes the table. The pending bits are
// read-only.
func (m *MSIX) Write(off uint64, p []byte) {
	m.table.Lock()
	defer m.table.Unlock()
	if off >= uint64(len(m.entries)) {
		return
	}
	n := copy(m.entries[off:], p)
	first, last := int(off)/entrySize, (int(off)+n-1)/entrySize
	for i := first; i <= last; i++ {
		control := m.entries[i*entrySize+entryControl : (i+1)*entrySize]
		control[0] &= entryMasked
		clear(control[1:])
	}
	m.update(first, last+1)
}

// update sends the pending messages of entries [first, end) that may be sent now. The
// caller holds table.
func (m *MSIX) update(first, end int) {
	if !m.enabled {
		return
	}
	for i := first; i < end; i++ {
		if !m.holds(i) && m.setPending(i, false) {
			m.send(i)
		}
	}
}

// Suspend holds all messages back until Resume: they stay pending. What was raised before
// is in the guest's interrupt controllers.
func (m *MSIX) Suspend() {
	m.table.Lock()
	defer m.table.Unlock()
	m.suspended = true
}

// Resume undoes Suspend and sends the pending messages.
func (m *MSIX) Resume() {
	m.table.Lock()
	defer m.table.Unlock()
	m.suspended = false
	m.update(0, m.Vectors())
}
