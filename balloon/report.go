package balloon

import (
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/virtio"
)

// report serves the reporting queue, section 5.5.6.7. The buffers are free memory,
// which is punched before the driver gets the request back. Pages stay as they
// are if the guest expects a pattern in them, since a punched page reads as zero,
// or if a pause is due.
func (b *Balloon) report(c *virtio.Chain) (uint32, error) {
	if b.keepReported || b.poison() != 0 {
		return 0, nil
	}
	for i := range c.Writable {
		if b.loop.Urgent() {
			break
		}
		s := &c.Writable[i]
		if gpa, n := wholePages(s.GPA, uint64(len(s.Buf))); n > 0 {
			b.punch(gpa, n)
		}
	}
	return 0, nil
}

// KeepReported is for tests: pages that the guest reports as free are not punched
// any more, which section 5.5.6.7 allows. It is called before the guest runs.
func (b *Balloon) KeepReported() { b.keepReported = true }

// wholePages is the part of a range that consists of whole pages, possibly none.
func wholePages(gpa, n uint64) (first, bytes uint64) {
	first = (gpa + mempage.Size - 1) &^ (mempage.Size - 1)
	end := (gpa + n) &^ (mempage.Size - 1)
	if end <= first {
		return first, 0
	}
	return first, end - first
}
