package pci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync"
)

// Interrupts turns messages into interrupts of the guest. Over KVM a GSI is an
// entry of the routing table; those of the PICs and of the IOAPIC stay as they
// are.
type Interrupts interface {
	// AllocateGSI returns a GSI that nobody else has.
	AllocateGSI() (uint32, error)
	// FreeGSI gives it back, with its route.
	FreeGSI(gsi uint32)
	// SetMSIRoutes adds or changes the routes of some GSIs, all in one call of
	// the kernel.
	SetMSIRoutes(routes []MSIRoute) error
	// AssignIRQFD makes each write to an eventfd raise the GSI. If the eventfd
	// has a count already, that raises it too.
	AssignIRQFD(gsi uint32, fd int) error
	// DeassignIRQFD takes it off; when it returns, what was raised before has
	// arrived in the guest's interrupt controllers.
	DeassignIRQFD(gsi uint32, fd int) error
}

// MSIRoute leads a GSI to a message: what a device would write, and where.
type MSIRoute struct {
	GSI     uint32
	Address uint64
	Data    uint32
}

const (
	// MaxVectors is the largest MSI-X table there can be.
	MaxVectors = 2048

	entrySize    = 16
	entryControl = 12 // vector control: bit 0 masks
	entryMasked  = 1

	controlEnable   = 1 << 15
	controlMask     = 1 << 14 // of the whole function
	controlWritable = controlEnable | controlMask
)

// MSIX is a function's message-signalled interrupts (PCI 3.0, section 6.8.2): a
// table of messages and a bit array of those that wait for being unmasked,
// both in one BAR. A message goes out through an eventfd that is the GSI's
// irqfd; a vector that is masked is kept pending here.
type MSIX struct {
	function *Function
	irqs     Interrupts
	logf     func(format string, args ...any)
	at       int // of the message control in the configuration space
	pba      uint64

	// table guards all that follows. Raise reads what the guest and the
	// machine change.
	table     sync.RWMutex
	enabled   bool
	masked    bool // the function
	suspended bool
	entries   []byte
	vectors   []vector

	pendingMu sync.Mutex // guards pending where table is only held for reading
	pending   []uint64
}

// vector is what is behind an entry on the host.
type vector struct {
	gsi   uint32
	event eventFD
	made  bool     // event and gsi are there
	route MSIRoute // as it was last set
	on    bool     // the irqfd is assigned
}

// AddMSIX gives the function MSI-X with n vectors, in BAR index. logf reports
// what the guest cannot be told of.
func (f *Function) AddMSIX(index, n int, irqs Interrupts, logf func(format string, args ...any)) (*MSIX, error) {
	if n < 1 || n > MaxVectors {
		return nil, fmt.Errorf("MSI-X: %d vectors, 1 to %d are possible", n, MaxVectors)
	}
	m := &MSIX{function: f, irqs: irqs, logf: logf, entries: make([]byte, n*entrySize), vectors: make([]vector, n), pending: make([]uint64, (n+63)/64)}
	for i := range n {
		m.entries[i*entrySize+entryControl] = entryMasked
	}
	m.pba = uint64(n*entrySize+4095) &^ 4095 // in another page, as 6.8.2 advises
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
	err := f.AddCapability(Capability{ID: CapMSIX, Data: data, Writable: mask, AfterWrite: func(data []byte, _, _ int) {
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

// make gets what a vector needs of the host.
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

// Vectors is the size of the table.
func (m *MSIX) Vectors() int { return len(m.vectors) }

// Enabled says whether the driver has turned MSI-X on.
func (m *MSIX) Enabled() bool {
	m.table.RLock()
	defer m.table.RUnlock()
	return m.enabled
}

// Raise sends the message of a vector, or makes it pending. A vector that is
// not in the table, and any while MSI-X is off, is ignored.
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
		m.logf("MSI-X vector %d: %v", i, err)
	}
}

// holds says whether the vector's messages must wait. The caller holds table.
func (m *MSIX) holds(i int) bool {
	return m.suspended || m.masked || m.entries[i*entrySize+entryControl]&entryMasked != 0
}

// setPending sets or clears a pending bit, and returns what it was.
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

// ClearPending forgets messages that wait: their causes are gone.
func (m *MSIX) ClearPending() {
	m.pendingMu.Lock()
	defer m.pendingMu.Unlock()
	clear(m.pending)
}

// setControl follows the message control word.
func (m *MSIX) setControl(control uint16) {
	m.table.Lock()
	defer m.table.Unlock()
	m.enabled, m.masked = control&controlEnable != 0, control&controlMask != 0
	m.update(0, len(m.vectors))
}

// Read lets the guest read the table or the pending bits.
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

// Write lets the guest write the table. The pending bits are read-only.
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

// update makes the host follow entries [first, end): routes in one batch, then
// irqfds, then what was pending. The caller holds table.
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
			m.logf("MSI-X: the guest's interrupts do not reach it: %v", err)
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
				m.logf("MSI-X vector %d: %v", i, err)
				continue
			}
			v.on = true
		}
		if m.setPending(i, false) {
			m.signal(i)
		}
	}
}

// message is what entry i says.
func (m *MSIX) message(i int) MSIRoute {
	e := m.entries[i*entrySize:]
	return MSIRoute{GSI: m.vectors[i].gsi, Address: binary.LittleEndian.Uint64(e), Data: binary.LittleEndian.Uint32(e[8:])}
}

// Suspend takes the irqfds off, so that everything that was raised is in the
// guest's interrupt controllers when they are saved. What is raised from now
// on is pending.
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

// Resume undoes Suspend, and sends what became pending.
func (m *MSIX) Resume() {
	m.table.Lock()
	defer m.table.Unlock()
	m.suspended = false
	m.update(0, len(m.vectors))
}

// Close gives GSIs and eventfds back.
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
