package machine

import (
	"fmt"
	"math/bits"
	"runtime"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/mempage"
)

// BenchmarkBoot is the time from nothing to the guest's first byte.
func BenchmarkBoot(b *testing.B) {
	for b.Loop() {
		con := vmtest.NewTape()
		m, err := New(testSpec(b, 1, vmtest.Obey), Ends{Serial: con}, nil)
		check(b, err)
		check(b, m.Boot())
		check(b, m.Start(false))
		con.Await(b, "B")
		b.StopTimer()
		check(b, m.Close())
		b.StartTimer()
	}
}

// BenchmarkPauseResume pauses and resumes two busy vCPUs.
func BenchmarkPauseResume(b *testing.B) {
	m := newCounting(b)
	for b.Loop() {
		check(b, m.Pause(b.Context()))
		check(b, m.Resume())
	}
}

// BenchmarkRingSync is a sync of 64 slots of 16 GiB with dirty rings: one look into each
// vCPU's ring, in which there are 16 pages.
func BenchmarkRingSync(b *testing.B) {
	var pages []uint64
	for range 64 {
		pages = append(pages, 16<<30/mempage.Size)
	}
	for _, cpus := range []int{1, 8, 32, 128, 254} {
		b.Run(fmt.Sprintf("vcpus=%d", cpus), func(b *testing.B) {
			r := newDirtyRings(newFakeRings(nil), slotsOf(pages...))
			rings := make([]*fakeRings, cpus)
			for i := range rings {
				rings[i] = newFakeRings(nil)
				r.vcpus = append(r.vcpus, rings[i])
			}
			looks, found := 0, 0
			for b.Loop() {
				b.StopTimer()
				for i, k := range rings {
					k.looks, k.taken = 0, nil
					for n := range uint64(16) {
						k.entries = append(k.entries, [2]uint64{n * 4, uint64(i)<<12 + n})
					}
				}
				b.StartTimer()
				check(b, r.collect())
				for slot := range pages {
					check(b, r.take(slot, func(_ int, word uint64) { found += bits.OnesCount64(word) }))
				}
				for _, k := range rings {
					looks += k.looks
				}
			}
			b.ReportMetric(float64(looks)/float64(b.N), "looks/op")
			b.ReportMetric(float64(found)/float64(b.N), "pages/op")
		})
	}
}

// BenchmarkState saves, encodes, decodes and loads vCPUs, on one processor and
// on all that there are: what a migration adds to the downtime besides memory.
func BenchmarkState(b *testing.B) {
	for _, cpus := range []int{2, 8, 32, 128} {
		for _, procs := range []int{1, runtime.GOMAXPROCS(0)} {
			b.Run(fmt.Sprintf("vcpus=%d/processors=%d", cpus, procs), func(b *testing.B) {
				defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
				benchmarkState(b, cpus)
			})
		}
	}
}

func benchmarkState(b *testing.B, cpus int) {
	m := newMachine(b, cpus, vmtest.JustCount, nil)
	var save, load time.Duration
	for b.Loop() {
		peer, err := New(m.Spec(), Ends{}, nil)
		check(b, err)
		began := time.Now()
		state, err := m.saveState()
		check(b, err)
		encoded, err := encodeState(state)
		check(b, err)
		save += time.Since(began)
		began = time.Now()
		state, err = decodeState(encoded)
		check(b, err)
		check(b, peer.loadState(state))
		load += time.Since(began)
		check(b, peer.Close())
		b.ReportMetric(float64(len(encoded)), "bytes")
	}
	b.ReportMetric(0, "ns/op") // making the other machine takes most of it
	b.ReportMetric(float64(save.Microseconds())/float64(b.N), "save-us/op")
	b.ReportMetric(float64(load.Microseconds())/float64(b.N), "load-us/op")
}
