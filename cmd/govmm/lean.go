package main

import (
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// startGarbage is how much memory Go may use at the start before it collects.
	startGarbage = 64 << 20
	// restGarbage is how much more a process at rest may use before it does.
	restGarbage = 4 << 20
	// settled is how long after its start a process counts as at rest.
	settled = time.Second
)

// collectLate keeps the start of a VM short and its process small. A collection
// would compete with the guest's first instructions, and it takes half a MiB of its
// own, which stays. So there is none as long as there is little to collect. A start
// that took much, for a kernel's content, gives it back once it has settled, and every one
// gives back the pages of the program that it needed.
//
// The environment variables GOGC and GOMEMLIMIT go before. The timer's owner stops it.
func collectLate() (settling *time.Timer) {
	if os.Getenv("GOGC") == "" && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(startGarbage)
		debug.SetGCPercent(-1)
		// The first collection finds it.
		runtime.AddCleanup(new([4]uint64), func(struct{}) {
			debug.SetGCPercent(100)
			debug.SetMemoryLimit(math.MaxInt64)
		}, struct{}{})
	}
	return time.AfterFunc(settled, func() {
		// runtime.ReadMemStats would cost memory: it empties the caches of all
		// processors.
		used := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
		metrics.Read(used)
		objects, all, released := used[0].Value.Uint64(), used[1].Value.Uint64(), used[2].Value.Uint64()
		if debug.SetMemoryLimit(-1) == startGarbage && objects < restGarbage {
			debug.SetMemoryLimit(int64(all-released) + restGarbage)
		} else {
			debug.FreeOSMemory()
		}
		unmapProgram()
	})
}
