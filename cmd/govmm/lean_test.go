package main

import (
	"math"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

// A process at rest has collected nothing, also if it is looked at after it has
// settled. Once it has allocated more than it may, it collects as any Go program, and
// so does one whose start took much.
func TestCollectsLate(t *testing.T) {
	if os.Getenv("GOVMM_TEST_LEAN") == "" {
		for _, start := range []string{"small", "large"} {
			cmd := exec.Command(os.Args[0], "-test.run=^TestCollectsLate$")
			cmd.Env = append(os.Environ(), "GOVMM_TEST_LEAN="+start, "GOGC=", "GOMEMLIMIT=")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s start: %v\n%s", start, err, out)
			}
		}
		return
	}
	defer collectLate().Stop()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	collections := m.NumGC // of the test binary itself
	large := os.Getenv("GOVMM_TEST_LEAN") == "large"
	if large {
		for range 32 {
			garbage = make([]byte, 1<<20)
		}
	}
	if runtime.ReadMemStats(&m); m.NumGC != collections {
		t.Errorf("%d collections at the start", m.NumGC-collections)
	}
	if !large {
		for debug.SetMemoryLimit(-1) == startGarbage { // until it has settled
			time.Sleep(time.Millisecond)
		}
		if runtime.ReadMemStats(&m); m.NumGC != collections {
			t.Errorf("%d collections at rest", m.NumGC-collections)
		}
		for range 16 {
			garbage = make([]byte, 1<<20)
		}
	}
	for debug.SetMemoryLimit(-1) != math.MaxInt64 { // which is set last
		time.Sleep(time.Millisecond)
	}
	if percent := debug.SetGCPercent(100); percent != 100 {
		t.Errorf("GOGC is %d", percent)
	}
	if runtime.ReadMemStats(&m); m.NumGC == collections {
		t.Error("nothing was collected")
	}
}

var garbage []byte

// A command is made by its name alone, and with all others if the name is none.
func TestCommandsByName(t *testing.T) {
	if n := len(newRoot(nil).Commands()); n != len(commands) {
		t.Errorf("%d commands of %d", n, len(commands))
	}
	for _, c := range commands {
		root := newRoot([]string{c.name, "--help"})
		if all := root.Commands(); len(all) != 1 || all[0].Name() != c.name {
			t.Errorf("%s: %v", c.name, all)
		}
	}
}
