package test

import (
	"encoding/json"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkCopyDisks moves a guest with a disk of 4 GiB (GOVMM_BENCH_DISK_MIB) that is full,
// between two files here, beside QEMU: its blockdev-mirror to an NBD server at the
// destination, then its migration, with pause-before-switchover, as libvirt does it. The
// time ends when the guest runs and the copy is durable. A guest that writes its disk at
// leisure gives time and processor seconds; one that does flat out the speed that it keeps.
func BenchmarkCopyDisks(b *testing.B) {
	needKVM(b)
	size := int64(4096)
	if n, err := strconv.Atoi(os.Getenv("GOVMM_BENCH_DISK_MIB")); err == nil && n > 0 {
		size = int64(n)
	}
	dir, err := os.MkdirTemp("", "gd")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	m := &diskBench{b: b, dir: dir, size: size * mib, got: map[string]map[string][]float64{"govmm": {}, "QEMU": {}}}
	m.fill()
	for b.Loop() {
		for _, speed := range []string{"100", "0"} {
			m.govmm(speed)
			m.qemu(speed)
		}
	}
	b.ReportMetric(0, "ns/op")
	for _, name := range []string{"s 100", "cpu-s 100", "stop-ms 100", "s 0", "stop-ms 0", "pages/s 0", "kept 0"} {
		ours, theirs := m.got["govmm"][name], m.got["QEMU"][name]
		var r []float64
		for i := range ours {
			if better := theirs[i] / max(ours[i], 1e-9); name == "pages/s 0" || name == "kept 0" {
				r = append(r, 1/better)
			} else {
				r = append(r, better)
			}
		}
		b.Logf("%-12s govmm %8.4g  QEMU %8.4g  ratio %.2f (more than 1 is better for govmm)", name, median(ours), median(theirs), median(r))
		b.ReportMetric(median(r), strings.ReplaceAll(name, " ", "-")+"-ratio")
	}
}

// diskBench is the disk, and what was measured.
type diskBench struct {
	b    *testing.B
	dir  string
	size int64
	got  map[string]map[string][]float64
}

func (m *diskBench) source() string { return filepath.Join(m.dir, "a.img") }
func (m *diskBench) target() string { return filepath.Join(m.dir, "there", "a.img") }

// fill makes the source's disk.
func (m *diskBench) fill() {
	m.b.Helper()
	f, err := os.Create(m.source())
	if err != nil {
		m.b.Fatal(err)
	}
	defer f.Close()
	r := rand.NewChaCha8([32]byte{1})
	buf := make([]byte, mib)
	for off := int64(0); off < m.size; off += int64(len(buf)) {
		_, _ = r.Read(buf) // never fails
		if _, err := f.WriteAt(buf, off); err != nil {
			m.b.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		m.b.Fatal(err)
	}
}

// begin makes both sides as they were.
func (m *diskBench) begin() {
	m.b.Helper()
	_ = unix.Removexattr(m.source(), "user.govmm.moved")
	if err := os.RemoveAll(filepath.Dir(m.target())); err != nil {
		m.b.Fatal(err)
	}
	if err := os.Mkdir(filepath.Dir(m.target()), 0o700); err != nil {
		m.b.Fatal(err)
	}
	unix.Sync()
	warmMemory(m.b)
}

func diskWords(speed string) string {
	return "fill=32M dirty=4M rate=1000 tick=0.25 disk=64M drate=" + speed
}

// settled waits until the guest writes its disk, and returns how many pages a second in one second.
func (m *diskBench) settled(l *lines) float64 {
	m.b.Helper()
	first, at := l.awaitTick(m.b, 0, "a disk that is written", func(k tick) bool { return k.more["dwrites"] > 100 })
	last, _ := l.awaitTick(m.b, at, "a second later", func(k tick) bool { return k.up >= first.up+1 })
	return speedOf([]tick{first, last})
}

func speedOf(all []tick) float64 {
	if len(all) < 2 {
		return 0
	}
	first, last := all[0], all[len(all)-1]
	return float64(last.more["dwrites"]-first.more["dwrites"]) / (last.up - first.up)
}

// add notes a move: before is the guest's speed before it, l the source's output since it began.
func (m *diskBench) add(who, speed string, took, stop, cpu time.Duration, before float64, ticks []tick) {
	add := func(name string, v float64) { m.got[who][name+" "+speed] = append(m.got[who][name+" "+speed], v) }
	during := speedOf(ticks)
	add("s", took.Seconds())
	add("cpu-s", cpu.Seconds())
	add("stop-ms", float64(stop.Microseconds())/1000)
	add("pages/s", during)
	add("kept", during/before)
	m.b.Logf("%-6s drate=%-4s %6.2f s, %5.2f processor s, stop %6.1f ms, the guest wrote %6.0f pages/s and %6.0f before", who, speed, took.Seconds(), cpu.Seconds(), float64(stop.Microseconds())/1000, during, before)
}

// durable has the copy on the storage.
func (m *diskBench) durable() {
	m.b.Helper()
	f, err := os.Open(m.target())
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		m.b.Fatal(err)
	}
	f.Close()
}

func (m *diskBench) govmm(speed string) {
	m.begin()
	h := newHost(m.b)
	src := h.start("run", "a", "--memory", "256M", "--disk", m.source(), "--cmdline", diskWords(speed))
	before := m.settled(src.out)
	dst, addr := h.receive("b", "--disk-dir", filepath.Dir(m.target()))
	at := len(src.out.ticks())
	cpu := cpuTime(m.b, src.cmd.Process.Pid) + cpuTime(m.b, dst.cmd.Process.Pid)
	began := time.Now()
	r, exit := h.migrate("a", "--to", addr, "--copy-disks", "--downtime-limit", "300ms")
	m.durable()
	took := time.Since(began)
	if exit != 0 {
		m.b.Fatalf("%+v", r)
	}
	after := cpuTime(m.b, dst.cmd.Process.Pid)
	src.wait()
	after += src.cmd.ProcessState.UserTime() + src.cmd.ProcessState.SystemTime()
	m.add("govmm", speed, took, time.Duration(r.DowntimeMS*float64(time.Millisecond)), after-cpu, before, src.out.ticks()[at:])
	dst.kill(unix.SIGKILL)
	dst.wait()
}

func (m *diskBench) qemu(speed string) {
	m.begin()
	disk := func(path string) []string {
		return []string{"-blockdev", "driver=file,filename=" + path + ",node-name=file", "-blockdev", "driver=raw,file=file,node-name=disk",
			"-device", "virtio-blk-pci,drive=disk"}
	}
	f, err := os.Create(m.target())
	if err == nil {
		err = f.Truncate(m.size)
	}
	if err != nil {
		m.b.Fatal(err)
	}
	f.Close()
	src := startQEMU(m.b, 256, 1, diskWords(speed), false, disk(m.source())...)
	before := m.settled(src.out)
	dst := startQEMU(m.b, 256, 1, diskWords(speed), true, disk(m.target())...)
	at := len(src.out.ticks())
	cpu := cpuTime(m.b, src.cmd.Process.Pid) + cpuTime(m.b, dst.cmd.Process.Pid)
	began := time.Now()
	stop := src.mirrorAndMove(dst)
	m.durable()
	took := time.Since(began)
	after := cpuTime(m.b, dst.cmd.Process.Pid) + cpuTime(m.b, src.cmd.Process.Pid)
	m.add("QEMU", speed, took, stop, after-cpu, before, src.out.ticks()[at:])
	src.end()
	dst.end()
}

// mirrorAndMove copies the node "disk" to dst's by NBD, and moves the guest, as libvirt does it.
// It returns the downtime.
func (q *qemu) mirrorAndMove(dst *qemu) time.Duration {
	q.tb.Helper()
	ports := [2]string{}
	for i := range ports {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			q.tb.Fatal(err)
		}
		_, ports[i], _ = net.SplitHostPort(ln.Addr().String())
		ln.Close()
	}
	type args = map[string]any
	dst.do("nbd-server-start", args{"addr": args{"type": "inet", "data": args{"host": "127.0.0.1", "port": ports[0]}}})
	dst.do("block-export-add", args{"type": "nbd", "id": "export", "node-name": "disk", "name": "disk", "writable": true})
	uri := "tcp:127.0.0.1:" + ports[1]
	for _, end := range []*qemu{dst, q} {
		end.do("migrate-set-capabilities", args{"capabilities": []any{args{"capability": "pause-before-switchover", "state": true}}})
		end.do("migrate-set-parameters", args{"downtime-limit": 300, "max-bandwidth": 1 << 40})
	}
	dst.do("migrate-incoming", args{"uri": uri})
	q.do("blockdev-add", args{"driver": "nbd", "node-name": "target", "export": "disk", "server": args{"type": "inet", "host": "127.0.0.1", "port": ports[0]}})
	q.do("blockdev-mirror", args{"job-id": "mirror", "device": "disk", "target": "target", "sync": "full"})
	q.awaitJob(func(ready bool) bool { return ready })
	q.do("migrate", args{"uri": uri})
	q.awaitMigration("pre-switchover")
	q.do("block-job-cancel", args{"device": "mirror"}) // of a job that is ready: it ends, with both alike
	q.awaitJob(nil)
	q.do("blockdev-del", args{"node-name": "target"})
	dst.do("nbd-server-stop", nil)
	q.do("migrate-continue", args{"state": "pre-switchover"})
	q.awaitMigration("completed")
	dst.awaitRunning()
	return dst.events["RESUME"].Sub(q.events["STOP"])
}

// awaitJob waits until the only block job is ready; with nil until there is none.
func (q *qemu) awaitJob(ok func(ready bool) bool) {
	q.tb.Helper()
	for deadline := time.Now().Add(10 * patience); ; time.Sleep(5 * time.Millisecond) {
		var jobs []struct {
			Ready bool
			Error string
		}
		if err := json.Unmarshal(q.do("query-block-jobs", nil), &jobs); err != nil {
			q.tb.Fatal(err)
		}
		if len(jobs) == 0 && ok == nil || len(jobs) == 1 && ok != nil && ok(jobs[0].Ready) {
			return
		}
		if len(jobs) == 0 || time.Now().After(deadline) {
			q.tb.Fatalf("QEMU's mirror: %+v", jobs)
		}
	}
}

// awaitMigration waits until the migration has a status.
func (q *qemu) awaitMigration(want string) {
	q.tb.Helper()
	for deadline := time.Now().Add(10 * patience); ; time.Sleep(5 * time.Millisecond) {
		var info struct{ Status, Error string }
		if err := json.Unmarshal(q.do("query-migrate", nil), &info); err != nil {
			q.tb.Fatal(err)
		}
		if info.Status == want {
			return
		}
		if info.Status == "failed" || time.Now().After(deadline) {
			q.tb.Fatalf("QEMU's migration is %s instead of %s", info.Status, want)
		}
	}
}
