package snapshot

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"sync"
	"sync/atomic"

	"github.com/govmm/govmm/mempage"
)

// sumUnit is how much memory one sum is of. Sums of different units are made at the same
// time, and the sum of memory is that of all these.
const sumUnit = 16 << 20

// unitSum is the sum of a unit: of its pages that are not zero, each with its number
// before it. A hole and a page of zeros are the same.
type unitSum struct {
	pages uint64 // that are not zero
	sum   [sha256.Size]byte
}

// summer makes it. Pages are added in order.
type summer struct {
	pages uint64
	hash  interface {
		Write([]byte) (int, error)
		Sum([]byte) []byte
	}
}

func newSummer() *summer { return &summer{hash: sha256.New()} }

// add adds the pages of b; first is the number of the first one.
func (s *summer) add(b []byte, first uint64) {
	var number [8]byte
	for i := uint64(0); len(b) > 0; i++ {
		page := b[:mempage.Size]
		b = b[mempage.Size:]
		if allZero(page) {
			continue
		}
		s.pages++
		binary.LittleEndian.PutUint64(number[:], first+i)
		_, _ = s.hash.Write(number[:])
		_, _ = s.hash.Write(page)
	}
}

func (s *summer) end() (u unitSum) {
	u.pages = s.pages
	s.hash.Sum(u.sum[:0])
	return u
}

func allZero(page []byte) bool {
	for ; len(page) >= 64; page = page[64:] {
		le := binary.NativeEndian
		if le.Uint64(page)|le.Uint64(page[8:])|le.Uint64(page[16:])|le.Uint64(page[24:])|
			le.Uint64(page[32:])|le.Uint64(page[40:])|le.Uint64(page[48:])|le.Uint64(page[56:]) != 0 {
			return false
		}
	}
	return true
}

// inUnits calls each for every unit of so many bytes of memory, on so many goroutines at
// once, and returns the sum of all and the pages that are not zero. done counts the bytes of
// the units that are done; nil: nobody counts.
func inUnits(size uint64, workers int, done *atomic.Uint64, each func(start, end int64) (unitSum, error)) (sum string, pages uint64, err error) {
	units := make([]unitSum, (size+sumUnit-1)/sumUnit)
	errs := make([]error, workers)
	var next atomic.Int64
	var failed atomic.Bool
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(units)) && !failed.Load(); i = next.Add(1) - 1 {
				end := min((i+1)*sumUnit, int64(size))
				if units[i], errs[w] = each(i*sumUnit, end); errs[w] != nil {
					failed.Store(true)
					return
				}
				if done != nil {
					done.Add(uint64(end - i*sumUnit))
				}
			}
		})
	}
	all.Wait()
	h := sha256.New()
	for i := range units {
		h.Write(units[i].sum[:])
		pages += units[i].pages
	}
	for _, err := range errs {
		if err != nil {
			return "", 0, err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), pages, nil
}

func sumOf(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}
