package balloon

import (
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/virtio"
)

// report serves the reporting queue, section 5.5.6.7: buffers are free memory,
// which is given back before the driver gets them back. Where the guest
// expects a pattern in free pages they stay as they are, since a page that was
// punched out reads as zero. So does what is left when a pause is due.
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

// KeepReported is for tests: what the guest reports as free stays where it is
// from now on, which section 5.5.6.7 allows; what it inflates goes as ever. It
// is called before the guest runs.
func (b *Balloon) KeepReported() { b.keepReported = true }

// wholePages is the part of a range that is whole pages; n may be 0.
func wholePages(gpa, n uint64) (first, bytes uint64) {
	first = (gpa + mempage.Size - 1) &^ (mempage.Size - 1)
	end := (gpa + n) &^ (mempage.Size - 1)
	if end <= first {
		return first, 0
	}
	return first, end - first
}
