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

	"github.com/govmm/govmm/internal/testcert"
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

// BenchmarkEngineTLS moves the memory of BenchmarkEngine by the engine, plain and over TLS
// with certificates of both sides, by one and by two connections.
func BenchmarkEngineTLS(b *testing.B) {
	size := filledMiB()
	ca := testcert.NewCA(b, "engine")
	plain := newSender(b, "migrate", "arrive", size, size)
	secure := newSenderOver(b, ca.WriteDir(b, ca.Issue(b, rawName)), "migrate", "arrive", size, size)
	t := newTurns(b)
	for b.Loop() {
		for _, n := range []int{1, 2} {
			t.add(fmt.Sprintf("plain, %d", n), plain.send(n))
			t.add(fmt.Sprintf("TLS, %d", n), secure.send(n))
		}
	}
	t.ratio("TLS, 1", "plain, 1", "of-plain-1")
	t.ratio("TLS, 2", "plain, 2", "of-plain-2")
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
// that slowly rewrites 4 MiB of it, by one and by two connections, beside its peers.
func BenchmarkMigrateFilled(b *testing.B) {
	size := filledMiB()
	migrations(b, size+128, fmt.Sprintf("fill=%dM dirty=4M rate=1000 tick=1", size), "filled ", downtimeLimit*time.Millisecond, 1, 2)
}

// BenchmarkMigrateBusy migrates a guest of 1 GiB that rewrites 64 MiB flat out with a
// downtime limit of 300 ms, by one and by two connections, beside its peers.
func BenchmarkMigrateBusy(b *testing.B) {
	c := migrations(b, 1024, "fill=900M dirty=64M rate=0 tick=1", "filled ", downtimeLimit*time.Millisecond, 1, 2)
	ours, _ := c.of("govmm", "stop-ms 1")
	if theirs, here := c.of("QEMU", "stop-ms 1"); here && !emulated() && ours > theirs {
		b.Errorf("a downtime of %.1f ms, QEMU's %.1f: no more than that is promised", ours, theirs)
	}
}

// BenchmarkMigrateTight is BenchmarkMigrateBusy with a downtime limit of 20 ms, by one
// connection.
func BenchmarkMigrateTight(b *testing.B) {
	migrations(b, 1024, "fill=900M dirty=64M rate=0 tick=1", "filled ", 20*time.Millisecond, 1)
}

// BenchmarkMigrateIdle is the downtime of a guest that does nothing, beside its peers.
func BenchmarkMigrateIdle(b *testing.B) {
	c := migrations(b, 512, "fill=16M tick=0", "filled ", downtimeLimit*time.Millisecond, 1)
	ours, _ := c.of("govmm", "stop-ms 1")
	theirs, here := c.of("QEMU", "stop-ms 1")
	if !emulated() && (ours > 10 || here && ours > theirs) {
		b.Errorf("a downtime of %.1f ms, QEMU's %.1f: promised are 10, and no more than that", ours, theirs)
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
