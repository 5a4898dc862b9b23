package pci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync"
)

// Interrupts delivers messages to the guest. With KVM a GSI is an entry of the
// routing table. The implementation keeps the entries of the PICs and the IOAPIC.
type Interrupts interface {
	// AllocateGSI returns a free GSI.
	AllocateGSI() (uint32, error)
	// FreeGSI frees the GSI and removes its route.
	FreeGSI(gsi uint32)
	// SetMSIRoutes adds or changes the routes of GSIs, all in one system call.
	SetMSIRoutes(routes []MSIRoute) error
	// AssignIRQFD makes each write to an eventfd raise the GSI. If the eventfd's
	// count is not 0, AssignIRQFD raises the GSI too.
	AssignIRQFD(gsi uint32, fd int) error
	// DeassignIRQFD undoes AssignIRQFD. When it returns, all earlier interrupts
	// are in the guest's interrupt controllers.
	DeassignIRQFD(gsi uint32, fd int) error
}

// MSIRoute connects a GSI to a message: a device's write of Data to Address.
type MSIRoute struct {
	GSI     uint32
	Address uint64
	Data    uint32
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
// table of messages and a pending bit array, both in one BAR. To send a message,
// MSIX signals an eventfd that is the irqfd of the vector's GSI. A message of a
// masked vector is pending until the guest unmasks the vector.
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
	vectors   []vector

	pendingMu sync.Mutex // guards pending; taken after table
	pending   []uint64
}

// vector is the host's part of a table entry.
type vector struct {
	gsi   uint32
	event eventFD
	made  bool     // event and gsi are valid
	route MSIRoute // the last route that was set
	on    bool     // the irqfd is assigned
}

// AddMSIX adds MSI-X with n vectors to the function, in BAR index. It calls report
// with errors of later calls, because the guest gets no answer to them.
func (f *Function) AddMSIX(index, n int, irqs Interrupts, report func(error)) (*MSIX, error) {
	if n < 1 || n > maxVectors {
		return nil, fmt.Errorf("MSI-X: number of vectors must be between 1 and %d, got %d", maxVectors, n)
	}
	m := &MSIX{function: f, irqs: irqs, report: report, entries: make([]byte, n*entrySize), vectors: make([]vector, n), pending: make([]uint64, (n+63)/64)}
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
	for i := range m.vectors {
		if err := m.vectors[i].make(irqs); err != nil {
			return nil, errors.Join(fmt.Errorf("MSI-X vector %d: %w", i, err), m.Close())
		}
	}
	f.msix = m
	return m, nil
}

// make allocates the vector's eventfd and GSI.
func (v *vector) make(irqs Interrupts) error {
	event, err := newEventFD()
	if err != nil {
		return err
	}
	if v.gsi, err = irqs.AllocateGSI(); err != nil {
		return errors.Join(err, event.close())
	}
	v.event, v.made = event, true
	return nil
}

// Vectors returns the size of the table.
func (m *MSIX) Vectors() int { return len(m.vectors) }

// Raise sends the message of a vector, or makes it pending. It does nothing if the
// vector is not in the table or MSI-X is off.
func (m *MSIX) Raise(i int) {
	m.table.RLock()
	defer m.table.RUnlock()
	if i < 0 || i >= len(m.vectors) || !m.enabled {
		return
	}
	if m.holds(i) || !m.vectors[i].on {
		m.setPending(i, true)
		return
	}
	m.signal(i)
}

// signal writes the vector's eventfd, which does not block.
func (m *MSIX) signal(i int) {
	if err := m.vectors[i].event.signal(); err != nil {
		m.report(fmt.Errorf("MSI-X vector %d: %w", i, err))
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
	m.update(0, len(m.vectors))
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

// update applies entries [first, end) on the host: first all routes in one call,
// then irqfds, then pending messages. The caller holds table.
func (m *MSIX) update(first, end int) {
	if !m.enabled || m.suspended || m.masked {
		return
	}
	var routes []MSIRoute
	for i := first; i < end; i++ {
		if r := m.message(i); !m.holds(i) && (r != m.vectors[i].route || !m.vectors[i].on) {
			routes = append(routes, r)
		}
	}
	if len(routes) > 0 {
		if err := m.irqs.SetMSIRoutes(routes); err != nil {
			m.report(fmt.Errorf("MSI-X: the guest does not get its interrupts: %w", err))
			return
		}
	}
	for i := first; i < end; i++ {
		v := &m.vectors[i]
		if m.holds(i) {
			continue
		}
		v.route = m.message(i)
		if !v.on {
			if err := m.irqs.AssignIRQFD(v.gsi, int(v.event)); err != nil {
				m.report(fmt.Errorf("MSI-X vector %d: %w", i, err))
				continue
			}
			v.on = true
		}
		if m.setPending(i, false) {
			m.signal(i)
		}
	}
}

// message returns the route that entry i describes.
func (m *MSIX) message(i int) MSIRoute {
	e := m.entries[i*entrySize:]
	return MSIRoute{GSI: m.vectors[i].gsi, Address: binary.LittleEndian.Uint64(e), Data: binary.LittleEndian.Uint32(e[8:])}
}

// Suspend deassigns the irqfds, so that all raised interrupts are in the guest's
// interrupt controllers before these are saved. Until Resume, messages stay
// pending.
func (m *MSIX) Suspend() error {
	m.table.Lock()
	defer m.table.Unlock()
	m.suspended = true
	return m.off()
}

func (m *MSIX) off() error {
	var errs []error
	for i := range m.vectors {
		v := &m.vectors[i]
		if v.on {
			errs = append(errs, m.irqs.DeassignIRQFD(v.gsi, int(v.event)))
			v.on = false
		}
	}
	return errors.Join(errs...)
}

// Resume undoes Suspend and sends the pending messages.
func (m *MSIX) Resume() {
	m.table.Lock()
	defer m.table.Unlock()
	m.suspended = false
	m.update(0, len(m.vectors))
}

// Close frees GSIs and closes eventfds.
func (m *MSIX) Close() error {
	m.table.Lock()
	defer m.table.Unlock()
	m.enabled = false
	errs := []error{m.off()}
	for i := range m.vectors {
		v := &m.vectors[i]
		if v.made {
			m.irqs.FreeGSI(v.gsi)
			errs = append(errs, v.event.close())
		}
		*v = vector{}
	}
	return errors.Join(errs...)
}
