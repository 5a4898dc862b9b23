package migrate

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"time"

	"github.com/govmm/govmm/mempage"
)

// The time for which a dirty rate is measured.
const (
	MinRateInterval     = 10 * time.Millisecond
	MaxRateInterval     = time.Minute
	DefaultRateInterval = time.Second
)

// rateSamples is how often the log is fetched: after the interval and its half, quarter
// and so on, since a round may take milliseconds or seconds.
const rateSamples = 8

// MeasureDirtyRate watches for an interval which pages are written. It turns the
// log on and off; the guest pays a fault for each page's first write.
func MeasureDirtyRate(ctx context.Context, ram RAM, log DirtyLog, interval time.Duration) (rate DirtyRate, err error) {
	if interval < MinRateInterval || interval > MaxRateInterval {
		return rate, fmt.Errorf("measure the dirty rate for %v: must be between %v and %v", interval, MinRateInterval, MaxRateInterval)
	}
	defer func() {
		if serr := log.StopDirtyLog(); serr != nil {
			err = errors.Join(err, fmt.Errorf("stop the dirty log: %w", serr))
		}
	}()
	if err := log.StartDirtyLog(); err != nil {
		return rate, fmt.Errorf("start the dirty log: %w", err)
	}
	w := newWatcher(ram.Slots(), log)
	if err := w.arm(); err != nil {
		return rate, err
	}
	began := time.Now()
	for n := range rateSamples {
		if err := sleep(ctx, time.Until(began.Add(interval>>(rateSamples-1-n)))); err != nil {
			return rate, err
		}
		after := time.Since(began)
		pages, err := w.look()
		if err != nil {
			return rate, err
		}
		rate.Samples = append(rate.Samples, DirtySample{After: after, Pages: pages})
		rate.Interval, rate.Pages = after, pages
	}
	for _, s := range ram.Slots() {
		rate.RAMBytes += s.Pages * mempage.Size
	}
	rate.BytesPerSecond = uint64(float64(rate.Pages*mempage.Size) / rate.Interval.Seconds())
	return rate, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// watcher counts the pages that were written since it armed them all.
type watcher struct {
	slots []Slot
	log   DirtyLog
	bulk  BulkLog          // log, if it is one
	seen  []mempage.Sparse // what was written, by slot
	pages uint64           // bits in seen
	bits  mempage.Bitmap   // scratch, as long as the largest slot
}

func newWatcher(slots []Slot, log DirtyLog) *watcher {
	w := &watcher{slots: slots, log: log}
	w.bulk, _ = log.(BulkLog)
	var longest uint64
	for _, s := range slots {
		w.seen = append(w.seen, mempage.NewSparse(s.Pages))
		longest = max(longest, s.Pages)
	}
	w.bits = mempage.NewBitmap(longest)
	return w
}

// arm makes the log report every write from now on: what it has is cleared and not
// needed.
func (w *watcher) arm() error {
	return w.fetch(func(slot int, reported mempage.Bitmap) error {
		// In steps, for the guest's page faults wait meanwhile.
		for first, pages := uint64(0), w.slots[slot].Pages; w.log.ManualProtect() && first < pages; first += maxClear {
			n := min(maxClear, pages-first)
			part := reported[first/mempage.WordBits : mempage.Words(first+n)]
			if err := w.log.ClearDirtyLog(slot, first, n, part); err != nil {
				return fmt.Errorf("clear KVM's dirty log of slot %d: %w", slot, err)
			}
		}
		return nil
	}, func(int, int, uint64) {})
}

// look returns how many pages have been written so far. It collects the bits in seen,
// since a fetch without manual protection clears them.
func (w *watcher) look() (pages uint64, err error) {
	note := func(slot, at int, word uint64) {
		word &= mempage.WordMask(uint64(at), 0, w.slots[slot].Pages) &^ w.seen[slot].Bitmap[at]
		w.pages += uint64(bits.OnesCount64(word))
		w.seen[slot].OrWord(uint64(at), word)
	}
	err = w.fetch(func(slot int, reported mempage.Bitmap) error {
		reported.EachWord(func(at int, word uint64) { note(slot, at, word) })
		return nil
	}, note)
	return w.pages, err
}

// fetch fetches both logs of every slot: as a whole or word by word.
func (w *watcher) fetch(whole func(slot int, reported mempage.Bitmap) error, word func(slot, at int, bits uint64)) error {
	if w.bulk != nil {
		if err := w.bulk.BeginSync(); err != nil {
			return fmt.Errorf("fetch the dirty log: %w", err)
		}
	}
	for slot, s := range w.slots {
		each := func(at int, bits uint64) { word(slot, at, bits) }
		var done bool
		var err error
		if w.bulk != nil {
			done, err = w.bulk.TakeDirtyLog(slot, each)
		}
		if b := w.bits[:mempage.Words(s.Pages)]; err == nil && !done {
			if err = w.log.FetchDirtyLog(slot, b); err == nil {
				if err := whole(slot, b); err != nil {
					return err
				}
			}
		}
		if err != nil {
			return fmt.Errorf("fetch KVM's dirty log of slot %d: %w", slot, err)
		}
		if err := w.log.FetchVMMDirty(slot, each); err != nil {
			return fmt.Errorf("fetch the VMM's dirty log of slot %d: %w", slot, err)
		}
	}
	return nil
}

// dirtied is how many pages a guest of a rate writes within d, interpolated between the
// samples and extrapolated after the last one, but never more than it has.
func dirtied(r DirtyRate, d time.Duration) uint64 {
	var before DirtySample
	for i, s := range r.Samples {
		if d <= s.After || i == len(r.Samples)-1 {
			span := max(s.After-before.After, time.Microsecond)
			pages := float64(before.Pages) + float64(d-before.After)/float64(span)*float64(s.Pages-before.Pages)
			return uint64(min(pages, float64(r.RAMBytes/mempage.Size)))
		}
		before = s
	}
	return 0
}

// populatedPages counts the pages that a migration would send with their content, and
// those that are populated but zero.
func populatedPages(ctx context.Context, ram RAM) (data, zero uint64, err error) {
	var populated [maxSpan / 64]uint64
	for slot, s := range ram.Slots() {
		for first := uint64(0); first < s.Pages; first += maxSpan {
			if err := context.Cause(ctx); err != nil {
				return 0, 0, err
			}
			if finder, ok := ram.(HoleFinder); ok {
				next, err := finder.NextPopulated(slot, first, s.Pages-first)
				if err != nil {
					return 0, 0, err
				}
				if first = next &^ (maxSpan - 1); next == s.Pages {
					break
				}
			}
			n := min(maxSpan, s.Pages-first)
			words := populated[:mempage.Words(n)]
			if err := ram.Populated(slot, first, n, words); err != nil {
				return 0, 0, err
			}
			span := ram.Bytes(slot, first, n)
			err := guard(ram, slot, first, span, func() error {
				forRuns(slices.Clone(words), func(start, end int) {
					for page := start; page < end; page++ {
						if isZero(span[page*mempage.Size:][:mempage.Size]) {
							zero++
						} else {
							data++
						}
					}
				})
				return nil
			})
			if err != nil {
				return 0, 0, err
			}
		}
	}
	return data, zero, nil
}
