package migrate

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// copiedLog is KVM's log of a guest that has touched all of its memory: a fetch copies a
// bitmap of its own for each slot, as KVM_GET_DIRTY_LOG does. A bit of 4,096 is set.
type copiedLog struct {
	plainLog
	bits []mempage.Bitmap
}

func (l *copiedLog) FetchDirtyLog(slot int, bitmap []uint64) error {
	copy(bitmap, l.bits[slot])
	return nil
}

// slotsOf are the slots of package memory for so many GiB, without those below 4 GiB.
func slotsOf(gib uint64) []Slot {
	slots := min(gib, 64)
	out := make([]Slot, slots)
	for i := range out {
		out[i] = Slot{GPA: uint64(i) * gib / slots << 30, Pages: gib / slots << 30 / mempage.Size}
	}
	return out
}

// heap is what is allocated.
func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// processorTime is what the process has used. It hardly depends on what else the machine
// does.
func processorTime() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// least is the least processor time of some runs.
func least(b *testing.B, f func() error) time.Duration {
	best := time.Hour
	for range 5 {
		began := processorTime()
		if err := f(); err != nil {
			b.Fatal(err)
		}
		best = min(best, processorTime()-began)
	}
	return best
}

// BenchmarkScale prints how the engine's own work grows: docs/scale.md. There is no KVM
// and no guest: what is measured is the engine, over logs that do what KVM's does.
func BenchmarkScale(b *testing.B) {
	for b.Loop() {
		scaleMemory(b)
		scaleDirtyRate(b)
		scaleChannels(b)
	}
}

func table(b *testing.B, title string, rows func(w *tabwriter.Writer)) {
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	rows(w)
	_ = w.Flush()
	b.Logf("%s\n%s", title, out.String())
}

// scaleMemory is the tracker by the size of memory.
func scaleMemory(b *testing.B) {
	table(b, "Memory", func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "memory\tslots\tbitmaps\tstart\tsync, all touched\tsync, one slot touched\tpass over holes\tlooks")
		for _, gib := range []uint64{16, 64, 256, 1024, 4096} {
			slots := slotsOf(gib)
			dense := &copiedLog{plainLog: plainLog{slots: slots}}
			for _, s := range slots {
				bits := mempage.NewBitmap(s.Pages)
				for page := uint64(0); page < s.Pages; page += 4096 {
					bits.Set(page)
				}
				dense.bits = append(dense.bits, bits)
			}
			before := heap()
			tr, err := newTracker(slots, dense, defaultClearBitmapShift)
			if err != nil {
				b.Fatal(err)
			}
			bitmaps := heap() - before
			began := processorTime()
			if err := tr.Start(); err != nil {
				b.Fatal(err)
			}
			start := processorTime() - began
			all := least(b, tr.Sync)

			ram := newPlainRAM()
			ram.slots = slots
			for _, s := range slots {
				ram.populated = append(ram.populated, mempage.NewSparse(s.Pages))
			}
			s := newPass(b, ram, &plainLog{slots: slots, sparse: true}, defaultClearBitmapShift, nil)
			one := least(b, func() error {
				if err := s.tracker.Sync(); err != nil {
					return err
				}
				return dense.FetchDirtyLog(0, s.tracker.kvmBits)
			})
			began = processorTime()
			s.stage = s.prepare(b.Context(), 0, 0)
			for {
				_, _, n, err := s.next(b.Context(), make([]uint64, maxSpan/mempage.WordBits))
				if err != nil {
					b.Fatal(err)
				}
				if n == 0 {
					break
				}
			}
			fmt.Fprintf(w, "%d GiB\t%d\t%.1f MiB\t%.1f ms\t%.2f ms\t%.3f ms\t%.1f ms\t%d\n", gib, len(slots), float64(bitmaps)/(1<<20), ms(start),
				ms(all), ms(one), ms(processorTime()-began), ram.looks)
		}
	})
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// scaleDirtyRate is the prediction of [predict] for a guest of 1 TiB by what it writes.
func scaleDirtyRate(b *testing.B) {
	table(b, "Dirty rate: a guest of 1 TiB, all in use, limit 300 ms", func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "link\twrites\tof\trounds\ttotal\tdowntime\t")
		for _, link := range []float64{1.1e9, 2.8e9, 11e9} {
			for _, share := range []float64{0, 0.1, 0.25, 0.5, 0.75, 0.95, 1.1} {
				const set = 64 << 30 // what it writes again and again
				rate := DirtyRate{RAMBytes: 1 << 40}
				for _, at := range []time.Duration{time.Millisecond, time.Duration(set / max(1, link*share) * float64(time.Second))} {
					at = min(at, time.Hour)
					pages := uint64(min(set, link*share*at.Seconds()) / mempage.Size)
					rate.Samples = append(rate.Samples, DirtySample{After: at, Pages: pages})
				}
				rate.Samples = append(rate.Samples, DirtySample{After: 2 * time.Hour, Pages: rate.Samples[1].Pages})
				e := predict(prediction{link: linkSpeed{bandwidth: link, rtt: 200 * time.Microsecond}, rate: rate, data: 1 << 40 / mempage.Size},
					Options{Timeout: 24 * time.Hour}.withDefaults())
				note := ""
				if !e.Converges {
					note = "does not converge"
				}
				fmt.Fprintf(w, "%.1f GB/s\t%.2f GB/s\t64 GiB\t%d\t%.0f s\t%.0f ms\t%s\n", link/1e9, link*share/1e9, e.Rounds, e.Total.Seconds(),
					ms(e.Downtime), note)
			}
		}
	})
}

// scaleChannels is the engine's memory by channels.
func scaleChannels(b *testing.B) {
	table(b, "Channels, on a host of 64 processors", func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "channels\tworkers\tcompress\tat one time")
		for _, channels := range []int{1, 2, 4, 8, 16} {
			workers, atOnce := compressors(64, channels)
			fmt.Fprintf(w, "%d\t%d\t%d\t%d\n", channels, channels, workers, min(workers, atOnce))
		}
	})
}
