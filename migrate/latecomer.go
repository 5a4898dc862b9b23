package migrate

import (
	"time"

	"github.com/govmm/govmm/mempage"
)

// Latecomer is a [Target] that can run while some of its memory is still at the source
// ([Options.Postcopy]).
type Latecomer interface {
	Target
	// CheckMissing reports what this host lacks for that.
	CheckMissing() error
	// Drop forgets the content of pages that will be missing, so that Miss takes less: bit i
	// of pages is page i of the slot. Data may land in them again.
	Drop(slot int, pages []uint64) error
	// Miss makes pages missing: bit i of missing[slot] is page i of the slot. Whoever touches
	// one waits until it has landed, whatever he is: vCPUs, devices, LoadState. want is called
	// once for each page that somebody waits for; it does not wait. Nothing else touches
	// memory during the call.
	Miss(missing [][]uint64, want func(slot int, first, n uint64)) (Missing, error)
}

// Missing is what a [Latecomer] lacks.
type Missing interface {
	// Land brings pages: for each bit i of pages, page first+i has the content at i pages of
	// content, or reads as zero if content is nil. A page that is not missing, or no more,
	// stays as it is: the guest may have written it. first is a multiple of 64.
	Land(slot int, first, n uint64, pages []uint64, content []byte) error
	// Lacks stores which pages of the slot have not landed.
	Lacks(slot int, words []uint64)
	Left() uint64 // pages that have not landed
	// Gone is closed when all have landed, or the machine needs no more of them: it was reset,
	// or has ended.
	Gone() <-chan struct{}
	// Anew makes want be called again for each page that somebody waits for.
	Anew()
	// Stop gives up what has not landed, since the guest goes on at the source. Whoever waits
	// gets an error, or finds zeros.
	Stop() error
	Stalls() Stalls
}

// Stalls is how long threads of a destination waited for missing pages: vCPUs, and what
// the kernel does for them.
type Stalls struct {
	Faults       uint64          `cbor:"faults"` // on missing pages
	Local        uint64          `cbor:"local"`  // on pages that are not missing and did not exist: no page was fetched
	P50          time.Duration   `cbor:"p50"`    // of the time from the fault to the page
	P99          time.Duration   `cbor:"p99"`
	Longest      time.Duration   `cbor:"longest"`
	Total        time.Duration   `cbor:"total"` // of all threads
	PerVCPU      []time.Duration `cbor:"vcpus,omitempty"`
	Left         uint64          `cbor:"left"`              // pages
	WaitingSince time.Duration   `cbor:"waiting,omitempty"` // how long the first of those that wait now has waited
	Failed       string          `cbor:"failed,omitempty"`  // what went wrong at the destination
}

// wantedPages is how many pages around one that is wanted come with it, if they are missing.
const wantedPages = 16

// bulkPages is how many pages a frame of those has that nobody waits for.
const bulkPages = 256

// landing is the receiver's side of the pages of one connection.
type landing struct {
	meta   spanMeta
	buffer []byte
}

// room returns a buffer for n pages.
func (l *landing) room(n uint64) []byte {
	if uint64(len(l.buffer)) < n*mempage.Size {
		l.buffer = make([]byte, n*mempage.Size)
	}
	return l.buffer[:n*mempage.Size]
}

// read reads the pages of a PAGES frame whose header has been read. content has the data
// pages where they lie in the span.
func (l *landing) read(c *conn, f header, slots []Slot) (content []byte, err error) {
	if err := f.span(slots); err != nil {
		return nil, err
	}
	if err := c.readFull(l.meta.bytes(f.count)); err != nil {
		return nil, err
	}
	if _, err := l.meta.decode(f); err != nil {
		return nil, err
	}
	content = l.room(uint64(f.count))
	forRuns(l.meta.data[:spanWords(f.count)], func(start, end int) {
		if err == nil {
			err = c.readFull(content[start*mempage.Size : end*mempage.Size])
		}
	})
	return content, err
}

// land brings what read has read.
func (l *landing) land(m Missing, f header, content []byte) error {
	words := spanWords(f.count)
	if err := m.Land(int(f.slot), f.first, uint64(f.count), l.meta.data[:words], content); err != nil {
		return err
	}
	return m.Land(int(f.slot), f.first, uint64(f.count), l.meta.zero[:words], nil)
}
