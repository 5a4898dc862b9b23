package machine

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/vmtest"
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

// BenchmarkState saves, encodes, decodes and loads vCPUs, on one processor and
// on all that there are: what a migration adds to the downtime besides memory.
func BenchmarkState(b *testing.B) {
	for _, cpus := range []int{2, 8, 32} {
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
