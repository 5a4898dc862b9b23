package test

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"testing"
	"time"
)

// Sizes of the benchmarks in MiB; GOVMM_BENCH_MIB takes another for the filled
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
	t.b.ReportMetric(0, "ns/op") // says nothing: it is all turns
	for _, name := range t.names {
		t.b.Logf("%-16s %6.2f s, %5.2f GB/s (median of %d)", name, median(t.took[name]), float64(mib)*1.048576e-3/median(t.took[name]), len(t.took[name]))
	}
}

// BenchmarkEngine moves memory that is full and that nothing writes, by one
// and by two connections: through the migration engine alone, without KVM, and
// over raw TCP from the same kind of memory into the same kind.
func BenchmarkEngine(b *testing.B) {
	size := filledMiB()
	engine, raw := newSender(b, "migrate", "arrive", size, size), newSender(b, "send", "receive", size, size)
	t := newTurns(b)
	for b.Loop() {
		for _, n := range []int{1, 2} {
			t.add(fmt.Sprintf("raw TCP, %d", n), raw.send(n))
			t.add(fmt.Sprintf("engine, %d", n), engine.send(n))
		}
	}
	t.ratio("engine, 1", "raw TCP, 1", "of-raw-1")
	t.ratio("engine, 2", "raw TCP, 2", "of-raw-2")
	t.ratio("engine, 2", "engine, 1", "two-to-one")
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

// BenchmarkMigrateBusy migrates a guest of 1 GiB that rewrites 64 MiB flat out
// with a downtime limit of 300 ms, in turn with QEMU.
func BenchmarkMigrateBusy(b *testing.B) {
	needKVM(b)
	h := newHost(b)
	const cmdline = "fill=900M dirty=64M rate=0 tick=1"
	src := h.start("run", "m0", "--memory", "1024M", "--cmdline", cmdline)
	src.out.awaitText(b, 0, "filled ")
	qsrc := startQEMU(b, 1024, 1, cmdline, false)
	qsrc.out.awaitText(b, 0, "filled ")
	t := newTurns(b)
	var down, bytes []float64
	n := 0
	for b.Loop() {
		_, addr := h.receive(fmt.Sprintf("m%d", n+1))
		r, exit := h.migrate(fmt.Sprintf("m%d", n), "--to", addr)
		if exit != 0 {
			b.Fatalf("%+v", r)
		}
		n++
		t.add("govmm", time.Duration(r.TotalMS)*time.Millisecond)
		qdst := startQEMU(b, 1024, 1, cmdline, true)
		q := qsrc.migrate(qdst, 1)
		t.add("QEMU", q.Total)
		qsrc.end()
		qsrc = qdst
		down = append(down, r.DowntimeMS/max(float64(q.Downtime.Milliseconds()), 1))
		bytes = append(bytes, float64(r.BytesSent)/float64(q.Bytes))
	}
	t.ratio("govmm", "QEMU", "of-QEMU")
	b.ReportMetric(median(down), "downtime-of-QEMU")
	b.ReportMetric(median(bytes), "bytes-of-QEMU")
	t.report(1024)
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
