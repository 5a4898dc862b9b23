package main

import (
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/migrate"
)

func TestPrintDirtyRateAndEstimate(t *testing.T) {
	var out strings.Builder
	check := func(err error, want ...string) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range want {
			if !strings.Contains(out.String(), w) {
				t.Errorf("%q is missing from\n%s", w, out.String())
			}
		}
		out.Reset()
	}
	r := migrate.DirtyRate{Interval: 1000 * time.Millisecond, Pages: 512, BytesPerSecond: 2 << 20, RAMBytes: 512 << 20,
		Samples: []migrate.DirtySample{{After: 8 * time.Millisecond, Pages: 4}, {After: 1000 * time.Millisecond, Pages: 512}}}
	check(printDirtyRate(&out, r), "WITHIN", "8 ms", "512", "2.00 MiB/s over 1000 ms, of 512 MiB of memory")
	e := migrate.Estimate{Converges: true, Rounds: 3, Total: 1234 * time.Millisecond, Downtime: 21500 * time.Microsecond, BandwidthBytes: 1 << 30, RAMBytes: 512 << 20, DataBytes: 256 << 20, DirtyRate: r}
	check(printEstimate(&out, e), "would complete: total ~1234 ms, 3 rounds, downtime ~21.5 ms", "256 MiB of 512 MiB", "1.00 GiB/s")
	e.Converges, e.Note = false, "too fast"
	check(printEstimate(&out, e), "would not converge: too fast")
	for _, bad := range []string{"9ms", "2m"} {
		d := map[string]int64{"9ms": 9e6, "2m": 120e9}[bad]
		if checkInterval(time.Duration(d)) == nil {
			t.Errorf("%s was taken", bad)
		}
	}
}
