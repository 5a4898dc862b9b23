package sandbox

import (
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestEachThread makes calls on all threads while goroutines start threads, block in the
// kernel, keep processors busy and have signals: each thread has made them afterwards, and a
// call that fails says so.
func TestEachThread(t *testing.T) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGUSR1) // a thread that blocks most signals
	defer signal.Stop(signals)
	var stop atomic.Bool
	var busy sync.WaitGroup
	defer func() { stop.Store(true); busy.Wait() }()
	for range 2 {
		busy.Go(func() { // threads that come and go
			for !stop.Load() {
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					runtime.LockOSThread() // and never unlocked: the thread ends
				}()
				<-ended
				time.Sleep(5 * time.Millisecond)
			}
		})
		busy.Go(func() { // in the kernel
			for !stop.Load() {
				ts := unix.Timespec{Nsec: 3e6}
				_ = unix.Nanosleep(&ts, nil)
			}
		})
		busy.Go(func() { // in Go
			for x := 0; !stop.Load(); x++ {
				if x%100_000_000 == 0 {
					runtime.GC()
				}
			}
		})
	}
	for turn := range 10 {
		calls := []threadCall{
			prctl(unix.PR_SET_TIMERSLACK, 60_000+uintptr(turn)), // a new thread inherits it
			prctl(unix.PR_CAPBSET_READ, 1<<20),
		}
		if err := eachThread(calls); err != nil {
			t.Fatal(err)
		}
		if calls[0].errno != 0 || calls[1].errno != uintptr(unix.EINVAL) {
			t.Fatalf("error numbers %d and %d, expected 0 and EINVAL", calls[0].errno, calls[1].errno)
		}
		list, err := threads()
		if err != nil {
			t.Fatal(err)
		}
		seen := 0
		for _, id := range list {
			slack, err := os.ReadFile(fmt.Sprintf("/proc/%d/timerslack_ns", id))
			if err != nil { // it has just ended
				continue
			}
			if got := strings.TrimSpace(string(slack)); got != fmt.Sprint(60_000+turn) {
				t.Fatalf("turn %d: thread %d has a timer slack of %s", turn, id, got)
			}
			seen++
		}
		if seen == 0 {
			t.Fatal("no thread's timer slack can be read")
		}
	}
}

func BenchmarkEachThread(b *testing.B) {
	for b.Loop() {
		if err := eachThread([]threadCall{prctl(unix.PR_SET_TIMERSLACK, 50_000)}); err != nil {
			b.Fatal(err)
		}
	}
}
