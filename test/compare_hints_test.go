package test

import (
	"fmt"
	"slices"
	"testing"
)

// hintLoss is the setting of a guest whose pages a hypervisor may lose.
type hintLoss struct {
	name   string
	memory int // MiB
	pool   int // MiB, at the upper end of memory
	shift  int // of the chunks that KVM's log is cleared in
}

// hintLosses are the cases in which QEMU 7.2 clears KVM's log for the pool's pages
// only at their hints: the pool is in another chunk than the memory that is sent
// first.
var hintLosses = []hintLoss{
	{"pool in the third GiB of 3, chunks of 1 GiB", 3072, 128, 18},
	{"pool in the first GiB, chunks of 4 MiB", 512, 128, 10},
}

// hintBandwidth is the limit for both, in MiB a second: fill= then takes four
// seconds, and the guest answers before the pool is sent.
const hintBandwidth = 16

// words is the guest's command line.
func (c *hintLoss) words() string {
	return fmt.Sprintf("fill=64M dirty=1M rate=100 verify=2 tick=1 pool=%dM keep=4M hintrace reports=0", c.pool)
}

// poolLoss returns how many pages of its pool a guest that has just arrived
// finds wrong, and how many it took back and rewrote since it was started.
// Between two ticks that are whole passes apart each page was checked as often.
func poolLoss(t testing.TB, l *lines) (bad, retaken uint64) {
	t.Helper()
	var seen []tick
	l.await(t, 0, "walk over the pool", func(s string) bool {
		k, ok := parseTick(s)
		if !ok {
			return false
		}
		for _, first := range seen {
			walked, pool := k.more["checked"]-first.more["checked"], k.more["pool"]
			if first.more["pool"] == pool && pool > 0 && walked >= pool && walked%pool == 0 {
				bad, retaken = (k.bad-first.bad)/(walked/pool), k.more["retaken"]
				return true
			}
		}
		seen = append(seen, k)
		return false
	})
	return bad, retaken
}

// underQEMU migrates a fresh guest once.
func (c *hintLoss) underQEMU(tb testing.TB) (bad, retaken uint64) {
	tb.Helper()
	more := []string{"-object", "iothread,id=hints", "-device", "virtio-balloon-pci,free-page-hint=on,iothread=hints",
		"-global", fmt.Sprintf("migration.x-clear-bitmap-shift=%d", c.shift)}
	src := startQEMU(tb, c.memory, 1, c.words(), false, more...)
	defer src.end()
	src.out.awaitText(tb, 0, "is ready in")
	dst := startQEMU(tb, c.memory, 1, c.words(), true, more...)
	defer dst.end()
	src.bandwidth = hintBandwidth << 20
	src.migrate(dst, 1)
	return poolLoss(tb, dst.out)
}

// here migrates a fresh guest once with govmm.
func (c *hintLoss) here(tb testing.TB, h *host, i int) (bad, retaken, kept uint64) {
	tb.Helper()
	from, to := fmt.Sprintf("c%d-%d", c.shift, i), fmt.Sprintf("d%d-%d", c.shift, i)
	src := h.start("run", from, "--memory", fmt.Sprintf("%dM", c.memory), "--cmdline", c.words())
	src.out.awaitText(tb, 0, "is ready in")
	dst, addr := h.receive(to)
	r, exit := h.migrate(from, "--to", addr, "--hints", "on", "--hint-wait", "5s", "--clear-bitmap-shift", fmt.Sprint(c.shift),
		"--bandwidth-limit", fmt.Sprintf("%dM", hintBandwidth))
	if exit != 0 {
		tb.Fatalf("%+v", r)
	}
	bad, retaken = poolLoss(tb, dst.out)
	h.must("stop", to, "--force")
	dst.wait()
	return bad, retaken, r.PagesHinted
}

// BenchmarkCompareHints migrates a demo guest that takes back and rewrites half of
// what it hints, by QEMU and by govmm in turn, a fresh guest each time. It reports how
// many of the rewritten pages are wrong at the destination. govmm may lose none.
func BenchmarkCompareHints(b *testing.B) {
	needKVM(b)
	for _, c := range hintLosses {
		b.Run(fmt.Sprintf("shift=%d", c.shift), func(b *testing.B) {
			h := newHost(b)
			n := count(2, 100)
			var theirs, ours, rewritten, rewrittenHere, kept []uint64
			for b.Loop() {
				for i := range n {
					bad, retaken := c.underQEMU(b)
					theirs, rewritten = append(theirs, bad), append(rewritten, retaken)
					bad, retaken, hinted := c.here(b, h, len(ours))
					ours, rewrittenHere, kept = append(ours, bad), append(rewrittenHere, retaken), append(kept, hinted)
					b.Logf("%d: QEMU lost %d of %d, govmm %d of %d", i, theirs[len(theirs)-1], rewritten[len(rewritten)-1], bad, retaken)
				}
			}
			b.Logf("%s: %d migrations each", c.name, len(ours))
			b.Logf("QEMU:  rewrote %s pages, of which %s were wrong at the destination; migrations that lost pages: %d", spread(rewritten), spread(theirs), losing(theirs))
			b.Logf("govmm: rewrote %s pages, of which %s were wrong at the destination; migrations that lost pages: %d; hints kept %s off the wire",
				spread(rewrittenHere), spread(ours), losing(ours), spread(kept))
			if losing(ours) != 0 {
				b.Errorf("govmm lost pages")
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(losing(theirs))/float64(len(theirs)), "QEMU-losing")
			b.ReportMetric(float64(losing(ours))/float64(len(ours)), "govmm-losing")
		})
	}
}

// spread is the median, and the least and the most if they differ.
func spread(v []uint64) string {
	v = slices.Sorted(slices.Values(v))
	if v[0] == v[len(v)-1] {
		return fmt.Sprint(v[0])
	}
	return fmt.Sprintf("%d (%d to %d)", v[len(v)/2], v[0], v[len(v)-1])
}

// losing counts the values that are not zero.
func losing(v []uint64) (n int) {
	for _, bad := range v {
		if bad != 0 {
			n++
		}
	}
	return n
}
