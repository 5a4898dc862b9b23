package test

import (
	"encoding/json"
	"fmt"
	"testing"

	"github.com/govmm/govmm/mempage"
)

// estimate is part of what migrate --estimate --json prints.
type estimate struct {
	Converges  bool    `json:"converges"`
	Rounds     int     `json:"rounds"`
	TotalMS    float64 `json:"total_ms"`
	DowntimeMS float64 `json:"downtime_ms"`
	DataBytes  uint64  `json:"data_bytes"`
}

// TestEstimate: an estimate moves nothing and changes neither side. In the long runs,
// on a quiet machine, it is within a factor of 1.5 of the migration that follows.
func TestEstimate(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	src := h.start("run", "src", "--memory", "256M", "--cmdline", "fill=128M dirty=4M rate=500 verify=1 tick=0.5")
	src.out.awaitText(t, 0, "filled ")
	there, addr := h.receive("dst")
	var rate struct {
		Pages   uint64 `json:"pages"`
		Samples []struct{ Pages uint64 }
	}
	if out := h.must("dirty-rate", "src", "--interval", "500ms", "--json"); json.Unmarshal([]byte(out), &rate) != nil {
		t.Fatalf("dirty-rate printed %q", out)
	}
	if rate.Pages == 0 || rate.Pages > 256*mib/mempage.Size || len(rate.Samples) != 8 {
		t.Errorf("a guest that writes 500 pages a second: %+v", rate)
	}
	var e estimate
	args := []string{"migrate", "src", "--to", addr, "--bandwidth-limit", "64M", "--downtime-limit", "2s"}
	if out := h.must(append(args, "--estimate", "--json")...); json.Unmarshal([]byte(out), &e) != nil {
		t.Fatalf("--estimate printed %q", out)
	}
	if e.DataBytes < 128*mib || e.DataBytes > 192*mib || e.Rounds < 1 || e.TotalMS <= 0 {
		t.Errorf("%+v", e)
	}
	if s := h.info("src").State + " " + h.info("dst").State; s != "running receiving" {
		t.Fatalf("after the estimate: %s", s)
	}
	r, exit := h.migrate(args[1:]...)
	if exit != 0 {
		t.Fatalf("%+v", r)
	}
	there.out.awaitTick(t, 0, "any", func(tick) bool { return true })
	t.Logf("estimated: %+v; then %d rounds, %d ms, downtime %.1f ms", e, len(r.Rounds)-1, r.TotalMS, r.DowntimeMS)
	if ratio := e.TotalMS / float64(r.TotalMS); full() && (ratio < 1/1.5 || ratio > 1.5) {
		t.Errorf("total: %.0f ms estimated, %d ms taken", e.TotalMS, r.TotalMS)
	}
}

// TestDowntimeLimitIsKept: 95 of 100 migrations of a guest that writes keep the limit,
// or the result says why not.
func TestDowntimeLimitIsKept(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	const limit = 100 // ms
	p := h.start("run", "d0", "--cpus", "2", "--memory", "256M", "--cmdline", "fill=128M dirty=8M rate=5000 verify=0 tick=1")
	p.out.awaitText(t, 0, "filled ")
	n, kept := count(3, 100), 0
	for i := range n {
		_, addr := h.receive(fmt.Sprintf("d%d", i+1))
		r, exit := h.migrate(fmt.Sprintf("d%d", i), "--to", addr, "--downtime-limit", fmt.Sprintf("%dms", limit))
		if exit != 0 {
			t.Fatalf("migration %d: %+v", i, r)
		}
		within := r.DowntimeMS <= 1.2*limit
		if within || r.DowntimeNote != "" {
			kept++
		}
		if within == (r.DowntimeNote != "") {
			t.Errorf("migration %d: a downtime of %.1f ms, and the note says %q", i, r.DowntimeMS, r.DowntimeNote)
		}
		var sum float64
		for _, ms := range r.Downtime {
			sum += ms
		}
		if sum < r.DowntimeMS-0.1 || sum > r.DowntimeMS+0.1 {
			t.Errorf("migration %d: the parts %v add up to %.2f ms, not %.2f", i, r.Downtime, sum, r.DowntimeMS)
		}
	}
	if kept*100 < 95*n {
		t.Errorf("%d of %d migrations kept the limit or said why not", kept, n)
	}
}
