package balloon

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/virtio"
)

// ErrPage is wrapped by the reason for DEVICE_NEEDS_RESET when the guest names pages
// that are not RAM.
var ErrPage = errors.New("the balloon driver names pages that are not RAM")

const (
	// pfnBatch is how many page numbers are sorted and merged together, four
	// times as many as Linux sends in a request.
	pfnBatch = 1024
	// maxPFNs is the limit of a request: the pages of 4 GiB.
	maxPFNs = 1 << 20
)

// pfnServer serves the inflate or the deflate queue, section 5.5.6: requests
// are arrays of page numbers, 32 bits each.
type pfnServer struct {
	b     *Balloon
	loop  *virtio.Loop
	punch bool // inflate

	raw  [4 * pfnBatch]byte
	pfns [pfnBatch]uint32
}

// serve checks the pages of a request and punches those of an inflation. It does
// nothing for a deflation: a page comes back when the guest accesses it. When a
// pause is due, it leaves out the rest, which the host then does not get back.
func (s *pfnServer) serve(c *virtio.Chain) (uint32, error) {
	n := c.ReadableLen()
	if n%4 != 0 || n/4 > maxPFNs {
		return 0, fmt.Errorf("%w: a request must have at most %d page numbers of 4 bytes, got %d bytes", ErrPage, maxPFNs, n)
	}
	for off := 0; off < n && !s.loop.Urgent(); {
		got := c.ReadAt(s.raw[:min(len(s.raw), n-off)], off)
		off += got
		pfns := s.pfns[:got/4]
		for i := range pfns {
			pfns[i] = binary.LittleEndian.Uint32(s.raw[4*i:])
		}
		if err := s.pages(pfns); err != nil {
			return 0, err
		}
	}
	return 0, nil
}

// pages handles each run of adjacent pages in a batch as one.
func (s *pfnServer) pages(pfns []uint32) error {
	slices.Sort(pfns)
	for len(pfns) > 0 {
		first, n, taken := uint64(pfns[0]), uint64(1), 1
		for ; taken < len(pfns); taken++ {
			// The same page may come twice.
			if next := uint64(pfns[taken]); next == first+n {
				n++
			} else if next != first+n-1 {
				break
			}
		}
		pfns = pfns[taken:]
		if err := s.run(first*mempage.Size, n*mempage.Size); err != nil {
			return err
		}
	}
	return nil
}

func (s *pfnServer) run(gpa, n uint64) error {
	if err := s.b.within(gpa, n); err != nil {
		return fmt.Errorf("%w: %w", ErrPage, err)
	}
	if s.punch {
		s.b.punch(gpa, n)
	}
	return nil
}

// within reports what is not memory. It does not fetch a page that has not come yet, where
// that can be told: the page is given up.
func (b *Balloon) within(gpa, n uint64) error {
	if m, ok := b.cfg.Memory.(interface{ Contains(gpa, n uint64) error }); ok {
		return m.Contains(gpa, n)
	}
	_, err := b.cfg.Memory.Slice(gpa, n)
	return err
}

// counter counts punched bytes, and notes the first failure.
type counter struct {
	bytes  atomic.Uint64
	failed atomic.Bool
}

// punch gives memory back to the host. A failure, which leaves the memory with the
// guest, is logged once.
func (b *Balloon) punch(gpa, n uint64) {
	if err := b.cfg.Puncher.Punch(gpa, n); err != nil {
		if !b.punched.failed.Swap(true) {
			b.cfg.Log.Error("memory is not given back to the host", "device", "balloon", "err", err)
		}
		return
	}
	b.punched.bytes.Add(n)
}

// Punched is how many bytes have been given back to the host, by inflation and by
// reporting. A page may count several times.
func (b *Balloon) Punched() uint64 { return b.punched.bytes.Load() }
