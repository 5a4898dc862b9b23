package test

import (
	"fmt"
	"testing"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/test/kernel"
	"golang.org/x/sys/unix"
)

// BenchmarkHintModes migrates the demo guest in the modes off, on and auto of --hints, over
// loopback and with three bandwidth limits. In mode auto it takes at most 1.05 of the
// better of the other two; and where the guest names its pages faster than the link
// carries them, so that on is the faster of the two, it spares 90% of the bytes that on
// spares.
func BenchmarkHintModes(b *testing.B) {
	needKVM(b)
	hintModes(b, func(b *testing.B) *linuxMoves {
		m := &linuxMoves{h: newHost(b)}
		m.at = m.h.start("run", "at0", "--memory", "512M", "--cmdline", "fill=192M dirty=4M rate=1000 tick=1 pool=192M keep=1M reports=0")
		m.at.out.awaitText(b, 0, "is ready in")
		return m
	})
}

// BenchmarkLinuxHintModes does so with Linux, most of whose memory is free and holds an old
// content. Each turn boots it eight times.
func BenchmarkLinuxHintModes(b *testing.B) {
	needKVM(b)
	l := linuxHints(kernel.NoACPI, "init_on_alloc=0", "--prefill")
	l.prepare(b)
	hintModes(b, func(b *testing.B) *linuxMoves { return l.boot(b) })
}

// hintModes measures the guests that start makes. A guest moves without hints first, so
// that its whole memory has content where it is, and then in another mode: what hints
// keep off the wire are holes where it arrives.
func hintModes(b *testing.B, start func(*testing.B) *linuxMoves) {
	for _, link := range []string{"loopback", "20M", "100M", "500M"} {
		b.Run(link, func(b *testing.B) {
			ms, bytes := map[string][]float64{}, map[string][]float64{}
			for b.Loop() {
				for _, mode := range []string{"on", "auto"} {
					m := start(b)
					for _, mode := range []string{"off", mode} {
						r := m.measure(b, mode, link)
						ms[mode], bytes[mode] = append(ms[mode], float64(r.TotalMS)), append(bytes[mode], float64(r.BytesSent))
					}
					m.end()
				}
			}
			for _, mode := range []string{"off", "on", "auto"} {
				b.Logf("%-4s %6.0f ms, %6.1f MB (medians of %d)", mode, median(ms[mode]), median(bytes[mode])/1e6, len(ms[mode]))
			}
			off, on, auto := median(bytes["off"]), median(bytes["on"]), median(bytes["auto"])
			ratio, spared := median(ms["auto"])/min(median(ms["off"]), median(ms["on"])), (off-auto)/(off-on)
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(ratio, "of-better")
			b.ReportMetric(spared, "of-spared")
			if !emulated() && ratio > 1.05 {
				b.Errorf("auto takes %.2f of the better of on and off: at most 1.05 is promised", ratio)
			}
			if !emulated() && median(ms["on"]) < median(ms["off"]) && spared < 0.9 {
				b.Errorf("auto spares %.2f of the bytes that on spares: at least 0.9 is promised", spared)
			}
		})
	}
}

// measure migrates the guest, in a mode of --hints and with a bandwidth limit.
func (m *linuxMoves) measure(b *testing.B, mode, link string) result {
	b.Helper()
	there, addr := m.h.receive(fmt.Sprintf("at%d", m.n+1))
	args := []string{fmt.Sprintf("at%d", m.n), "--to", addr, "--hints", mode}
	if link != "loopback" {
		args = append(args, "--bandwidth-limit", link)
	}
	warm(b)
	r, exit := m.h.migrate(args...)
	if exit != 0 || r.Status != "completed" {
		b.Fatalf("exit %d, %+v", exit, r)
	}
	m.at.wait()
	m.n++
	m.at = there
	b.Logf("%s %s: %d ms, of them %d waiting; %d bytes; %d pages named, %d hinted, %d late; %d sent; stopped for %.1f ms",
		mode, link, r.TotalMS, r.HintWaitMS, r.BytesSent, r.HintsReceived, r.PagesHinted, r.HintsLate, r.PagesSent, r.DowntimeMS)
	return r
}

// end ends the guest.
func (m *linuxMoves) end() {
	m.at.kill(unix.SIGKILL)
	m.at.wait()
}

// warm touches memory and frees it again. Where the machine is itself a guest whose host
// takes free memory back, what is allocated next is then as cheap for one as for the other.
func warm(tb testing.TB) {
	tb.Helper()
	const size = 2 << 30
	p, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		tb.Fatal(err)
	}
	_ = unix.Madvise(p, unix.MADV_HUGEPAGE) // where there are none, small pages do
	for i := 0; i < size; i += mempage.Size {
		p[i] = 1
	}
	if err := unix.Munmap(p); err != nil {
		tb.Fatal(err)
	}
}
