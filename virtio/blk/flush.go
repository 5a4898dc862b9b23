package blk

import (
	"fmt"
	"sync"
	"sync/atomic"
)

// flushes makes writes durable, and sees to it that the guest learns of each failure.
//
// The kernel reports a write that it could not carry out by one fdatasync(2) of an
// open file, and by no later one: what follows says nothing about what was lost. So
// a failure belongs to every flush that had begun, or waited, when it was found. If
// none of these was the guest's, the failure is kept for the guest's next one.
// Once the guest has been told it is the guest's to deal with, as that of any disk.
type flushes struct {
	// finished and begun count calls of fdatasync. They are written under flushMu.
	finished atomic.Uint64
	begun    atomic.Uint64

	// untold is a failure that no request of the guest has reported.
	untold atomic.Pointer[error]

	// changed counts requests that have changed the image.
	changed atomic.Uint64

	// flushMu is held while the storage is flushed, and guards what is below.
	flushMu sync.Mutex
	failed  uint64 // the last call that failed, from 1
	err     error  // of that one
	durable uint64 // changed, as it was when the last call that succeeded began; 1 more
}

// flush makes writes durable that have completed; if the guest has written nothing since
// the last one, there is nothing to do. guest says that a request of the guest reports
// the result.
func (d *Device) flush(guest bool) error {
	f := &d.flushes
	// All that completed before now is covered by a flush that begins from now on.
	// One that is under way may be the one that finds the failure.
	begun, finished := f.begun.Load(), f.finished.Load()
	f.flushMu.Lock()
	defer f.flushMu.Unlock()
	changed := f.changed.Load() + 1
	// A flush for the guest may be for what others wrote to the file.
	if f.begun.Load() == begun && (guest || changed != f.durable) {
		n := f.begun.Add(1)
		if err := d.image.flush(); err != nil {
			f.failed, f.err, f.durable = n, err, 0
			f.untold.Store(&err)
		} else {
			f.durable = changed
		}
		f.finished.Store(n)
	}
	if guest {
		if err := f.tell(); err != nil {
			return err
		}
	} else if untold := f.untold.Load(); untold != nil {
		return fmt.Errorf("%w: writes may be lost, and the guest learns of it when it flushes next", *untold)
	}
	if f.failed > finished {
		return f.err
	}
	return nil
}

// tell returns a failure that the guest has not been told of, and is told of now.
func (f *flushes) tell() error {
	if f.untold.Load() == nil {
		return nil
	}
	if err := f.untold.Swap(nil); err != nil {
		return *err
	}
	return nil
}

// forget is for a driver that has reset the device.
func (f *flushes) forget() { f.untold.Store(nil) }
