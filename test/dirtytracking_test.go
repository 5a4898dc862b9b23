package test

import (
	"fmt"
	"testing"
)

// BenchmarkDirtyTracking migrates small guests in turn, one with dirty bitmaps and one
// with dirty rings: a pair that is mostly idle, and a pair that rewrites memory flat
// out.
func BenchmarkDirtyTracking(b *testing.B) {
	needKVM(b)
	for _, work := range []struct{ name, cmdline string }{
		{"idle", "fill=192M dirty=1M rate=100 verify=0 tick=1"},
		{"flat-out", "fill=192M dirty=64M rate=0 verify=0 tick=1"},
	} {
		b.Run(work.name, func(b *testing.B) {
			h := newHost(b)
			ways := []string{"bitmap", "ring"}
			at := map[string]int{}
			for _, way := range ways {
				p := h.start("run", way+"0", "--cpus", "2", "--memory", "256M", "--dirty-tracking", way, "--cmdline", work.cmdline)
				p.out.awaitText(b, 0, "filled ")
				h.must("pause", way+"0")
			}
			totals, downs := map[string][]float64{}, map[string][]float64{}
			for b.Loop() {
				for _, way := range ways {
					h.must("resume", fmt.Sprintf("%s%d", way, at[way])) // the other is paused
					next := at[way] + 1
					_, addr := h.receive(fmt.Sprintf("%s%d", way, next), "--dirty-tracking", way)
					r, exit := h.migrate(fmt.Sprintf("%s%d", way, at[way]), "--to", addr)
					if exit != 0 {
						b.Fatalf("%s: %+v", way, r)
					}
					at[way] = next
					h.must("pause", fmt.Sprintf("%s%d", way, next))
					totals[way] = append(totals[way], float64(r.TotalMS))
					downs[way] = append(downs[way], r.DowntimeMS)
				}
			}
			for _, way := range ways {
				b.ReportMetric(median(totals[way]), way+"-total-ms")
				b.ReportMetric(median(downs[way]), way+"-downtime-ms")
			}
			b.ReportMetric(median(totals["ring"])/median(totals["bitmap"]), "ring/bitmap")
			b.ReportMetric(0, "ns/op") // the time of both ways together means nothing
		})
	}
}
