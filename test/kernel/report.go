package kernel

import (
	"encoding/binary"

	"github.com/govmm/govmm/mempage"
)

// The magic number of a report page, and the layout's version.
const (
	reportMagic0  = 0x474f486d6d766f67 // "govmmHOG"
	reportMagic1  = 0x312d74726f706572 // "report-1"
	reportVersion = 1
)

// Report has the counters of a first process (init/report.h). They are read while the
// process counts, so they are not of one moment.
type Report struct {
	Pages    uint64 // in the working set
	Passes   uint64 // over the working set, completed
	Written  uint64 // pages written, cumulative
	Verified uint64 // pages found as they should be, cumulative
	Bad      uint64 // pages found otherwise, cumulative

	// The first bad page, the word in it, and that word's content.
	BadPage, BadWord, BadWant, BadFound uint64
}

// FindReport returns the offset of the report page in guest memory that starts at a
// page boundary, or -1.
func FindReport(memory []byte) int {
	for at := 0; at+mempage.Size <= len(memory); at += mempage.Size {
		if _, ok := ParseReport(memory[at:]); ok {
			return at
		}
	}
	return -1
}

// ParseReport reads a report page. ok is false if the page is not one.
func ParseReport(page []byte) (r Report, ok bool) {
	le := binary.LittleEndian
	if len(page) < 12*8 || le.Uint64(page) != reportMagic0 || le.Uint64(page[8:]) != reportMagic1 || le.Uint64(page[16:]) != reportVersion {
		return Report{}, false
	}
	for i, v := range []*uint64{&r.Pages, &r.Passes, &r.Written, &r.Verified, &r.Bad, &r.BadPage, &r.BadWord, &r.BadWant, &r.BadFound} {
		*v = le.Uint64(page[24+8*i:])
	}
	return r, true
}
