package platform

import "sync"

// Events of pvpanic (docs/specs/pvpanic.rst in QEMU, linux/uapi/misc/pvpanic.h).
const (
	pvPanicked    = 1 << 0 // the guest's kernel has panicked
	PVCrashLoaded = 1 << 1 // the same, and a crash kernel takes over
	pvpanicEvents = pvPanicked | PVCrashLoaded
)

// PVPanic is a port by which a guest's kernel reports a panic. It has no state.
type PVPanic struct {
	panicked func(events byte)
	once     sync.Once
}

// NewPVPanic returns the device. It calls panicked once, from a vCPU's thread, with
// the events of the guest's first write. The guest continues when panicked returns.
func NewPVPanic(panicked func(events byte)) *PVPanic { return &PVPanic{panicked: panicked} }

// Read returns the events that the device accepts.
func (d *PVPanic) Read(_ uint64, p []byte) {
	clear(p)
	p[0] = pvpanicEvents
}

// Write reports events.
func (d *PVPanic) Write(_ uint64, p []byte) {
	if events := p[0] & pvpanicEvents; events != 0 {
		d.once.Do(func() { d.panicked(events) })
	}
}
