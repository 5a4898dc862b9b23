package main

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
	"time"
	"unsafe"
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

// TestUnmapProgram: the program goes on without the pages that are taken from it, which are
// its own, read-only and whole.
func TestUnmapProgram(t *testing.T) {
	list := readOnly()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	if len(list) < 2 {
		t.Errorf("%d mappings, expected those of code and of constants", len(list))
	}
	for _, m := range list {
		start := uintptr(unsafe.Pointer(&m[0]))
		if !strings.Contains(string(maps), fmt.Sprintf("%08x-", start)) {
			t.Errorf("no mapping begins at %#x in\n%s", start, maps)
		}
		if bytes.Count(m[:64], []byte{0}) == 64 {
			t.Errorf("%#x holds zeros", start)
		}
	}
	unmapProgram()
	if again := readOnly(); len(again) != len(list) {
		t.Errorf("%d mappings, %d before", len(again), len(list))
	}
}
