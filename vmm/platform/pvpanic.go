package platform

import "sync"

// Events of pvpanic (docs/specs/pvpanic.rst in QEMU, linux/uapi/misc/pvpanic.h).
const (
	PVPanicked    = 1 << 0 // the guest's kernel has panicked
	PVCrashLoaded = 1 << 1 // it has, and a crash kernel takes over
	pvpanicEvents = PVPanicked | PVCrashLoaded
)

// PVPanic is a port by which a guest's kernel says that it has panicked. It has
// no state.
type PVPanic struct {
	panicked func(events byte)
	once     sync.Once
}

// NewPVPanic returns the device. panicked is called once, from a vCPU's thread,
// with the events of the guest's first write; the guest runs on when it returns.
func NewPVPanic(panicked func(events byte)) *PVPanic { return &PVPanic{panicked: panicked} }

// Read returns the events that the device takes.
func (d *PVPanic) Read(_ uint64, p []byte) {
	clear(p)
	p[0] = pvpanicEvents
}

// Write takes events.
func (d *PVPanic) Write(_ uint64, p []byte) {
	if events := p[0] & pvpanicEvents; events != 0 {
		d.once.Do(func() { d.panicked(events) })
	}
}
