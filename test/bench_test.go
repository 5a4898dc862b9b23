package test

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// Sizes of the benchmarks in MiB. GOVMM_BENCH_MIB is another size for the filled
// guest.
func filledMiB() int {
	if n, err := strconv.Atoi(os.Getenv("GOVMM_BENCH_MIB")); err == nil && n > 0 {
		return n
	}
	return 3072
}

func median(v []float64) float64 {
	v = slices.Clone(v)
	slices.Sort(v)
	return v[len(v)/2]
}

// turns collects the durations of several ways to do one thing, turn by turn.
type turns struct {
	b     *testing.B
	names []string
	took  map[string][]float64
}

func newTurns(b *testing.B) *turns { return &turns{b: b, took: map[string][]float64{}} }

func (t *turns) add(name string, d time.Duration) {
	if t.took[name] == nil {
		t.names = append(t.names, name)
	}
	t.took[name] = append(t.took[name], d.Seconds())
}

// ratio reports how many times as fast as base name was, turn by turn, as the
// median.
func (t *turns) ratio(name, base, unit string) {
	var r []float64
	for i, d := range t.took[name] {
		r = append(r, t.took[base][i]/d)
	}
	t.b.ReportMetric(median(r), unit)
}

func (t *turns) report(mib int) {
	t.b.ReportMetric(0, "ns/op") // the time of all turns together means nothing
	for _, name := range t.names {
		t.b.Logf("%-16s %6.2f s, %5.2f GB/s (median of %d)", name, median(t.took[name]), float64(mib)*1.048576e-3/median(t.took[name]), len(t.took[name]))
	}
}

// BenchmarkEngine moves memory that is full and that nothing writes, by one
// and by two connections: through the migration engine alone, without KVM, and
// over raw TCP from the same kind of memory into the same kind. It also reports
// what an estimate predicts.
func BenchmarkEngine(b *testing.B) {
	size := filledMiB()
	engine, raw := newSender(b, "migrate", "arrive", size, size), newSender(b, "send", "receive", size, size)
	t := newTurns(b)
	for b.Loop() {
		for _, n := range []int{1, 2} {
			t.add(fmt.Sprintf("raw TCP, %d", n), raw.send(n))
			t.add(fmt.Sprintf("engine, %d", n), engine.send(n))
			t.add(fmt.Sprintf("predicted, %d", n), engine.send(n, predict))
		}
	}
	t.ratio("predicted, 1", "engine, 1", "of-predicted-1")
	t.ratio("predicted, 2", "engine, 2", "of-predicted-2")
	t.ratio("engine, 1", "raw TCP, 1", "of-raw-1")
	t.ratio("engine, 2", "raw TCP, 2", "of-raw-2")
	t.ratio("engine, 2", "engine, 1", "two-to-one")
	t.report(size)
}

// BenchmarkEngineBesideQEMU moves the memory of BenchmarkEngine, in turn with QEMU,
// whose guest has filled as much and is then idle: by one connection, and by two
// (QEMU's multifd). Where there is no KVM QEMU interprets the guest; its migration
// is the same code, and the guest needs hardly any processor time.
func BenchmarkEngineBesideQEMU(b *testing.B) {
	size := filledMiB()
	engine := newSender(b, "migrate", "arrive", size, size)
	cmdline := fmt.Sprintf("fill=%dM tick=0", size)
	qsrc := startQEMU(b, size+128, 1, cmdline, false)
	qsrc.out.awaitText(b, 0, "filled ")
	t := newTurns(b)
	for b.Loop() {
		for _, n := range []int{1, 2} {
			t.add(fmt.Sprintf("engine, %d", n), engine.send(n))
			qdst := startQEMU(b, size+128, 1, cmdline, true)
			t.add(fmt.Sprintf("QEMU, %d", n), qsrc.migrate(qdst, n).Total)
			qsrc.end()
			qsrc = qdst
		}
	}
	t.ratio("engine, 1", "QEMU, 1", "of-QEMU-1")
	t.ratio("engine, 2", "QEMU, 2", "of-QEMU-2")
	t.report(size)
}

// BenchmarkEngineSparse moves 16 GiB of which 100 MiB were touched.
func BenchmarkEngineSparse(b *testing.B) {
	engine := newSender(b, "migrate", "arrive", 16<<10, 100)
	t := newTurns(b)
	for b.Loop() {
		t.add("engine", engine.send(2))
	}
	b.ReportMetric(median(t.took["engine"])*1000, "ms")
	t.report(100)
}

// BenchmarkCompression moves 256 MiB of program code over a link of 100 MB/s,
// a veth pair between two network namespaces with a token bucket filter, without
// compression and with each.
func BenchmarkCompression(b *testing.B) {
	const netns, host = "govmm-bench", "10.213.7.2"
	ip := func(args ...string) {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			b.Skipf("NO NETWORK NAMESPACES HERE, NOT MEASURED: %v: %v: %s", args, err, out)
		}
	}
	b.Cleanup(func() { _ = exec.Command("ip", "netns", "del", netns).Run() }) // takes the pair along
	ip("ip", "netns", "add", netns)
	ip("ip", "link", "add", "govmm-b0", "type", "veth", "peer", "name", "govmm-b1", "netns", netns)
	ip("ip", "addr", "add", "10.213.7.1/24", "dev", "govmm-b0")
	ip("ip", "link", "set", "govmm-b0", "up")
	ip("ip", "-n", netns, "addr", "add", host+"/24", "dev", "govmm-b1")
	ip("ip", "-n", netns, "link", "set", "govmm-b1", "up")
	ip("ip", "-n", netns, "link", "set", "lo", "up")
	ip("tc", "qdisc", "add", "dev", "govmm-b0", "root", "tbf", "rate", "800mbit", "burst", "1mb", "latency", "50ms")
	const size = 256
	engine := newSender(b, "migrate", "arrive", size, size)
	engine.netns, engine.host = netns, host
	t := newTurns(b)
	for b.Loop() {
		for _, c := range []string{"none", "zstd", "lz4"} {
			t.add(c, engine.send(2, c))
		}
	}
	t.ratio("zstd", "none", "zstd-to-none")
	t.ratio("lz4", "none", "lz4-to-none")
	t.report(size)
}

// BenchmarkMigrateFilled migrates a guest of 3 GiB whose memory is full and
// that slowly rewrites 4 MiB of it, by one and by two connections; in turn with
// it go raw TCP, and QEMU with the same guest.
func BenchmarkMigrateFilled(b *testing.B) {
	needKVM(b)
	h := newHost(b)
	size := filledMiB()
	cmdline := fmt.Sprintf("fill=%dM dirty=4M rate=1000 tick=1", size)
	src := h.start("run", "m0", "--memory", fmt.Sprintf("%dM", size+128), "--cmdline", cmdline)
	src.out.awaitText(b, 0, "filled ")
	raw := newSender(b, "send", "receive", size, size)
	qsrc := startQEMU(b, size+128, 1, cmdline, false)
	qsrc.out.awaitText(b, 0, "filled ")
	t := newTurns(b)
	n := 0
	for b.Loop() {
		for _, channels := range []int{1, 2} {
			t.add(fmt.Sprintf("raw TCP, %d", channels), raw.send(channels))
			_, addr := h.receive(fmt.Sprintf("m%d", n+1))
			r, exit := h.migrate(fmt.Sprintf("m%d", n), "--to", addr, "--channels", strconv.Itoa(channels))
			if exit != 0 {
				b.Fatalf("%+v", r)
			}
			n++
			t.add(fmt.Sprintf("govmm, %d", channels), time.Duration(r.TotalMS)*time.Millisecond)
			qdst := startQEMU(b, size+128, 1, cmdline, true)
			t.add(fmt.Sprintf("QEMU, %d", channels), qsrc.migrate(qdst, channels).Total)
			qsrc.end()
			qsrc = qdst
		}
	}
	for _, c := range []string{"1", "2"} {
		t.ratio("govmm, "+c, "raw TCP, "+c, "of-raw-"+c)
		t.ratio("govmm, "+c, "QEMU, "+c, "of-QEMU-"+c)
	}
	t.report(size)
}

// besideQEMU migrates our guest and QEMU's in turn. Both have the same command line
// and memory. It calls each with the results of each turn, and with the output of our
// guest at its destination.
func besideQEMU(b *testing.B, memMiB int, cmdline string, each func(ours result, guest *lines, theirs qemuResult)) {
	b.Helper()
	h := newHost(b)
	src := h.start("run", "m0", "--memory", fmt.Sprintf("%dM", memMiB), "--cmdline", cmdline)
	src.out.awaitText(b, 0, "filled ")
	qsrc := startQEMU(b, memMiB, 1, cmdline, false)
	qsrc.out.awaitText(b, 0, "filled ")
	for n := 0; b.Loop(); n++ {
		dst, addr := h.receive(fmt.Sprintf("m%d", n+1))
		r, exit := h.migrate(fmt.Sprintf("m%d", n), "--to", addr)
		if exit != 0 {
			b.Fatalf("%+v", r)
		}
		qdst := startQEMU(b, memMiB, 1, cmdline, true)
		each(r, dst.out, qsrc.migrate(qdst, 1))
		qsrc.end()
		qsrc = qdst
	}
}

// BenchmarkMigrateBusy migrates a guest of 1 GiB that rewrites 64 MiB flat out
// with a downtime limit of 300 ms, in turn with QEMU. QEMU's downtime is from
// STOP to RESUME. Ours is reported with the longest gap that the guest measured by its
// TSC in the second of the move (the TSC of QEMU's guest stands still during the move).
func BenchmarkMigrateBusy(b *testing.B) {
	needKVM(b)
	t := newTurns(b)
	var down, gap, bytes []float64
	besideQEMU(b, 1024, "fill=900M dirty=64M rate=0 tick=1", func(r result, guest *lines, q qemuResult) {
		t.add("govmm", time.Duration(r.TotalMS)*time.Millisecond)
		t.add("QEMU", q.Total)
		k, _ := guest.awaitTick(b, 0, "the first", func(tick) bool { return true })
		gap = append(gap, k.gap/r.DowntimeMS)
		down = append(down, r.DowntimeMS/max(float64(q.Downtime.Milliseconds()), 1))
		bytes = append(bytes, float64(r.BytesSent)/float64(q.Bytes))
	})
	t.ratio("govmm", "QEMU", "of-QEMU")
	b.ReportMetric(median(down), "downtime-of-QEMU")
	b.ReportMetric(median(gap), "gap-of-downtime")
	b.ReportMetric(median(bytes), "bytes-of-QEMU")
	t.report(1024)
	if !emulated() && (median(down) > 1 || median(bytes) > 1) {
		b.Errorf("%.2f of QEMU's downtime and %.2f of its bytes: no more than its own is promised", median(down), median(bytes))
	}
}

// BenchmarkMigrateIdle is the downtime of a guest that does nothing, in turn
// with QEMU. Ours is what govmm reports, from the order to stop to the message that
// the guest runs there; QEMU's is from STOP to RESUME. The downtime that QEMU reports
// ends when the source has sent all; it is printed too.
func BenchmarkMigrateIdle(b *testing.B) {
	needKVM(b)
	var ours, theirs, sent []float64
	besideQEMU(b, 512, "fill=16M tick=0", func(r result, _ *lines, q qemuResult) {
		ours = append(ours, r.DowntimeMS)
		theirs = append(theirs, float64(q.Downtime.Microseconds())/1000)
		sent = append(sent, float64(q.Sent.Milliseconds()))
	})
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(sent), "QEMU-says-ms")
	b.ReportMetric(median(ours), "downtime-ms")
	b.ReportMetric(median(theirs), "QEMU-downtime-ms")
	if !emulated() && (median(ours) > 10 || median(ours) > median(theirs)) {
		b.Errorf("a downtime of %.1f ms, QEMU's %.1f: promised are 10, and no more than that", median(ours), median(theirs))
	}
}

// BenchmarkWriteSpeed is the share of its speed that a guest keeps during precopy
// over a link of 100 MB/s, in turn with QEMU. The guest writes flat out; its own ticks
// at the source give the speed.
func BenchmarkWriteSpeed(b *testing.B) {
	needKVM(b)
	h := newHost(b)
	const cmdline, limit = "fill=400M dirty=16M rate=0 tick=0.5", 100 << 20
	// speed is pages a second between the first and the last tick from a line on.
	speed := func(l *lines, from int) float64 {
		var all []tick
		for _, s := range l.snapshot()[from:] {
			if k, ok := parseTick(s); ok {
				all = append(all, k)
			}
		}
		if len(all) < 2 {
			b.Fatalf("%d ticks in that time", len(all))
		}
		first, last := all[0], all[len(all)-1]
		return float64(last.writes-first.writes) / max(last.up-first.up, 1e-3)
	}
	// share measures the guest for some ticks alone, and then while move moves it.
	share := func(l *lines, move func()) float64 {
		from := l.len()
		for range 5 {
			_, from = l.awaitTick(b, from, "another", func(tick) bool { return true })
		}
		alone := speed(l, from-5)
		from = l.len()
		move()
		return speed(l, from) / alone
	}
	var ours, theirs []float64
	for b.Loop() {
		n := len(ours)
		src := h.start("run", fmt.Sprintf("w%d", n), "--memory", "512M", "--cmdline", cmdline)
		src.out.awaitText(b, 0, "filled ")
		dst, addr := h.receive(fmt.Sprintf("w%d-there", n))
		ours = append(ours, share(src.out, func() {
			if r, exit := h.migrate(fmt.Sprintf("w%d", n), "--to", addr, "--bandwidth-limit", strconv.Itoa(limit)); exit != 0 {
				b.Fatalf("%+v", r)
			}
		}))
		dst.kill(syscall.SIGKILL)
		qsrc := startQEMU(b, 512, 1, cmdline, false)
		qsrc.out.awaitText(b, 0, "filled ")
		qdst := startQEMU(b, 512, 1, cmdline, true)
		qsrc.bandwidth = limit
		theirs = append(theirs, share(qsrc.out, func() { qsrc.migrate(qdst, 1) }))
		qsrc.end()
		qdst.end()
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(100*median(ours), "%-kept")
	b.ReportMetric(100*median(theirs), "%-kept-by-QEMU")
}

// BenchmarkMigrateSparse migrates a guest of 16 GiB that has touched 100 MiB.
func BenchmarkMigrateSparse(b *testing.B) {
	needKVM(b)
	h := newHost(b)
	src := h.start("run", "m0", "--memory", "16G", "--cmdline", "fill=100M tick=1")
	src.out.awaitText(b, 0, "filled ")
	var ms []float64
	n := 0
	for b.Loop() {
		_, addr := h.receive(fmt.Sprintf("m%d", n+1))
		r, exit := h.migrate(fmt.Sprintf("m%d", n), "--to", addr)
		if exit != 0 {
			b.Fatalf("%+v", r)
		}
		n++
		ms = append(ms, float64(r.TotalMS))
	}
	b.ReportMetric(median(ms), "ms")
	b.ReportMetric(0, "ns/op")
}
