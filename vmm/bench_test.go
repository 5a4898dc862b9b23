package vmm

import (
	"fmt"
	"runtime"
	"testing"
	"time"
)

// BenchmarkBoot is the time from nothing to the guest's first byte.
func BenchmarkBoot(b *testing.B) {
	needKVM(b)
	for b.Loop() {
		con := newTape()
		spec, err := NewSpec(testConfig(1, obey))
		check(b, err)
		m, err := NewMachine(spec, Ends{Serial: con}, nil)
		check(b, err)
		check(b, m.Boot())
		check(b, m.Start(false))
		con.await(b, "B")
		b.StopTimer()
		check(b, m.Close())
		b.StartTimer()
	}
}

// BenchmarkPauseResume pauses and resumes two busy vCPUs.
func BenchmarkPauseResume(b *testing.B) {
	m := newCounting(b)
	for b.Loop() {
		check(b, m.Pause())
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
	m := newMachine(b, cpus, justCount, nil)
	var save, load time.Duration
	for b.Loop() {
		twin, err := NewMachine(m.Spec(), Ends{}, nil)
		check(b, err)
		began := time.Now()
		state, err := m.SaveState()
		check(b, err)
		encoded, err := EncodeState(state)
		check(b, err)
		save += time.Since(began)
		began = time.Now()
		state, err = DecodeState(encoded)
		check(b, err)
		check(b, twin.LoadState(state))
		load += time.Since(began)
		check(b, twin.Close())
		b.ReportMetric(float64(len(encoded)), "bytes")
	}
	b.ReportMetric(0, "ns/op") // most of it is the making of the twin
	b.ReportMetric(float64(save.Microseconds())/float64(b.N), "save-us/op")
	b.ReportMetric(float64(load.Microseconds())/float64(b.N), "load-us/op")
}
