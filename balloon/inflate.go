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

// ErrPage is wrapped by what DEVICE_NEEDS_RESET is set for when the guest names
// memory that it does not have.
var ErrPage = errors.New("the balloon driver names memory that is not there")

const (
	// pfnBatch is how many page numbers are looked at together: four times
	// what Linux sends in a request.
	pfnBatch = 1024
	// maxPFNs bounds a request: 4 GiB worth of pages. A driver has no reason to
	// put more in one.
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

// serve checks the pages of a request and, for inflation, gives them back. To
// deflate is nothing: a page is there again when it is touched. When a pause is
// due the rest is not looked at: a page of the balloon that is not given back
// is memory that the host does without.
func (s *pfnServer) serve(c *virtio.Chain) (uint32, error) {
	n := c.ReadableLen()
	if n%4 != 0 || n/4 > maxPFNs {
		return 0, fmt.Errorf("%w: a request of %d bytes of page numbers", ErrPage, n)
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

// pages finds the runs in a batch and handles each as one.
func (s *pfnServer) pages(pfns []uint32) error {
	slices.Sort(pfns)
	for len(pfns) > 0 {
		first, n, taken := uint64(pfns[0]), uint64(1), 1
		for ; taken < len(pfns); taken++ {
			// A page may be named twice.
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
	if _, err := s.b.cfg.Memory.Slice(gpa, n); err != nil {
		return fmt.Errorf("%w: %w", ErrPage, err)
	}
	if s.punch {
		s.b.punch(gpa, n)
	}
	return nil
}

// counter counts what was punched out, and the first failure.
type counter struct {
	bytes  atomic.Uint64
	failed atomic.Bool
}

// punch gives memory back. A failure is the host's, and harms no one: the host
// keeps the memory. It is told once.
func (b *Balloon) punch(gpa, n uint64) {
	if err := b.cfg.Puncher.Punch(gpa, n); err != nil {
		if !b.punched.failed.Swap(true) {
			b.cfg.Log.Error("memory is not given back to the host", "device", "balloon", "err", err)
		}
		return
	}
	b.punched.bytes.Add(n)
}

// Punched is the number of bytes that were given back to the host so far, by
// inflation and by reporting; a page may count several times.
func (b *Balloon) Punched() uint64 { return b.punched.bytes.Load() }
