package vmm

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"github.com/govmm/govmm/vmm/serial"
)

// line is the other end of one of the guest's lines, which says so when output is lost:
// that is nothing that happens to the guest, and no error of its VM.
type line struct {
	serial.Backend
	name string
	log  *slog.Logger

	lossMu sync.Mutex // guards all below
	lost   uint64     // bytes that were not reported
	told   bool       // that output is being lost
	last   time.Time  // when that was told
}

// lossEvery is the least time between two reports: a full disk may take a byte now and
// then.
const lossEvery = 10 * time.Second

// Write always succeeds.
func (l *line) Write(p []byte) (int, error) {
	n, err := l.Backend.Write(p)
	l.lossMu.Lock()
	defer l.lossMu.Unlock()
	switch {
	case err == nil:
		l.ended()
	case errors.Is(err, os.ErrClosed), errors.Is(err, net.ErrClosed): // by Close
	default:
		l.lost += uint64(len(p) - n)
		if !l.told && (l.last.IsZero() || time.Since(l.last) >= lossEvery) {
			l.told, l.last = true, time.Now()
			l.log.Warn("output of the guest is lost from here on", "device", l.name, "err", err)
		}
	}
	return len(p), nil
}

// ended reports the end of a loss that was told. lossMu is held.
func (l *line) ended() {
	if l.told {
		l.log.Warn("output of the guest is taken again", "device", l.name, "lost_bytes", l.lost)
		l.told, l.lost = false, 0
	}
}

// Close ends a Write under way.
func (l *line) Close() error {
	if err := l.Backend.Close(); err != nil {
		l.log.Warn("close the other end", "device", l.name, "err", err)
	}
	l.lossMu.Lock()
	defer l.lossMu.Unlock()
	if l.lost > 0 {
		l.log.Warn("output of the guest was lost", "device", l.name, "lost_bytes", l.lost)
		l.told, l.lost = false, 0
	}
	return nil
}
