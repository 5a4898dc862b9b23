package test

import (
	"encoding/json"
	"fmt"
	"net"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// postcopied is what a guest that moved before its memory did says of it.
type postcopied struct {
	total time.Duration // from the command until all memory has come
	there *lines        // the guest's, at the destination
}

// slowLoopback takes this goroutine, and what it starts, to a network whose loopback carries
// so many MB a second, for all peers alike.
func slowLoopback(b *testing.B, rate int) {
	b.Helper()
	needRoot(b)
	runtime.LockOSThread() // for ever: the thread ends with the goroutine
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		b.Fatal(err)
	}
	for _, c := range [][]string{{"ip", "link", "set", "lo", "up"},
		{"tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", fmt.Sprintf("%dmbps", rate), "burst", "1m", "limit", "4m"}} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			b.Fatalf("%v: %v: %s", c, err, out)
		}
	}
}

// postcopyPeer moves a guest that has filled its memory by a peer's postcopy, which is begun
// after the first round, where that can be said.
type postcopyPeer struct {
	name string
	move func(memMiB int, cmdline string, b *testing.B) (postcopied, func())
}

func (q *qemu) postcopyTo(dst *qemu, capabilities ...string) time.Duration {
	q.tb.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		q.tb.Fatal(err)
	}
	uri := map[string]any{"uri": "tcp:" + ln.Addr().String()}
	ln.Close()
	var list []any
	for _, c := range capabilities {
		list = append(list, map[string]any{"capability": c, "state": true})
	}
	for _, end := range []*qemu{dst, q} {
		end.do("migrate-set-capabilities", map[string]any{"capabilities": list})
		end.do("migrate-set-parameters", map[string]any{"downtime-limit": downtimeLimit, "max-bandwidth": 1 << 40, "max-postcopy-bandwidth": 1 << 40})
	}
	dst.do("migrate-incoming", uri)
	began := time.Now()
	q.do("migrate", uri)
	for started, deadline := false, time.Now().Add(10*patience); ; time.Sleep(5 * time.Millisecond) {
		var info struct {
			Status string `json:"status"`
			Error  string `json:"error-desc"`
			RAM    struct {
				Syncs int `json:"dirty-sync-count"`
			} `json:"ram"`
		}
		if err := json.Unmarshal(q.do("query-migrate", nil), &info); err != nil {
			q.tb.Fatal(err)
		}
		switch {
		case info.Status == "completed":
			return time.Since(began)
		case info.Status == "failed" || info.Status == "postcopy-paused" || time.Now().After(deadline):
			q.tb.Fatalf("QEMU's migration is %s: %s", info.Status, info.Error)
		case !started && info.RAM.Syncs >= 2: // the first round is over
			started = true
			q.do("migrate-start-postcopy", nil)
		}
	}
}

func postcopyPeers(b *testing.B) (all []postcopyPeer) {
	b.Helper()
	peers := map[string]peer{}
	for _, p := range findPeers(b) {
		peers[p.name] = p
	}
	for _, backing := range []string{"anonymous", "memfd"} {
		all = append(all, postcopyPeer{"govmm " + backing, func(memMiB int, cmdline string, b *testing.B) (postcopied, func()) {
			h := newHost(b)
			src := h.start("run", "s", "--memory", fmt.Sprintf("%dM", memMiB), "--memory-backing", backing, "--cmdline", cmdline)
			src.out.awaitText(b, 0, "filled ")
			dst, addr := h.receive("d", "--memory-backing", backing)
			began := time.Now()
			r, exit := h.migrate("s", "--to", addr, "--postcopy=1")
			took := time.Since(began)
			if exit != 0 || r.Postcopy == nil {
				b.Fatalf("exit %d, %+v", exit, r)
			}
			b.Logf("govmm %s: downtime %.1f ms, %+v", backing, r.DowntimeMS, *r.Postcopy)
			return postcopied{took, dst.out}, func() { dst.kill(unix.SIGKILL); <-dst.done; <-src.done }
		}})
	}
	if _, ok := peers["QEMU"]; ok {
		for name, c := range map[string][]string{"QEMU": {"postcopy-ram"}, "QEMU preempt": {"postcopy-ram", "postcopy-preempt"}} {
			all = append(all, postcopyPeer{name, func(memMiB int, cmdline string, b *testing.B) (postcopied, func()) {
				src := startQEMU(b, memMiB, 1, cmdline, false)
				src.out.awaitText(b, 0, "filled ")
				dst := startQEMU(b, memMiB, 1, cmdline, true)
				return postcopied{src.postcopyTo(dst, c...), dst.out}, func() { src.end(); dst.end() }
			}})
		}
	}
	if p, ok := peers["Cloud Hypervisor"]; ok && p.start != nil {
		all = append(all, postcopyPeer{"Cloud Hypervisor", func(memMiB int, cmdline string, b *testing.B) (postcopied, func()) {
			src := p.start(memMiB, cmdline, false).(*cloudHypervisor)
			src.out.awaitText(b, 0, "filled ")
			dst := startCloudHypervisor(b, exec.Command(src.cmd.Path, "--seccomp", "false"), src.remote, src.socket+"-to", false)
			dst.receive(",memory_mode=postcopy")
			began := time.Now()
			src.send(dst, ",memory_mode=postcopy")
			// It says nothing when the last page has come; its source's process ends.
			ended := make(chan struct{})
			go func() { _, _ = src.cmd.Process.Wait(); close(ended) }()
			select {
			case <-ended:
			case <-time.After(patience):
				b.Fatal("Cloud Hypervisor's source does not end")
			}
			return postcopied{time.Since(began), dst.out}, func() { src.end(); dst.end() }
		}})
	}
	return all
}

// BenchmarkPostcopy moves a guest that rewrites two thirds of its memory faster than the link
// carries it: the time until all of it has come, how long the guest stood still at most after
// its arrival, by its own clock, and how much it wrote in its first seconds there.
func BenchmarkPostcopy(b *testing.B) {
	needKVM(b)
	mem, fill, dirty, rate := 768, 640, 512, 125
	if full() {
		mem, fill, dirty, rate = 3072, 2560, 2048, 500
	}
	slowLoopback(b, rate)
	peers := postcopyPeers(b)
	cmdline := fmt.Sprintf("fill=%dM dirty=%dM rate=0 tick=0.25", fill, dirty)
	const seconds = 4
	got := map[string]figures{}
	for b.Loop() {
		for _, p := range peers {
			if full() {
				warmMemory(b)
			}
			r, end := p.move(mem, cmdline, b)
			first, next := r.there.awaitTick(b, 0, "at the destination", func(tick) bool { return true })
			gap, writes := first.gap, [seconds]uint64{}
			last := first
			r.there.awaitTick(b, next, "some seconds there", func(k tick) bool {
				gap = max(gap, k.gap)
				if s := int(last.up - first.up); s < seconds {
					writes[s] += k.writes - last.writes
				}
				last = k
				return k.up >= first.up+seconds
			})
			end()
			if got[p.name] == nil {
				got[p.name] = figures{}
			}
			f := got[p.name]
			f["s"], f["gap-ms"] = append(f["s"], r.total.Seconds()), append(f["gap-ms"], gap)
			for i, n := range writes {
				name := fmt.Sprintf("kpages-in-s%d", i+1)
				f[name] = append(f[name], float64(n)/1000)
			}
		}
	}
	b.ReportMetric(0, "ns/op") // the time of all turns together means nothing
	for _, p := range peers {
		f := got[p.name]
		line := fmt.Sprintf("%-17s  s %.3g  gap-ms %.3g  kpages a second", p.name, median(f["s"]), median(f["gap-ms"]))
		for i := range seconds {
			line += fmt.Sprintf(" %.4g", median(f[fmt.Sprintf("kpages-in-s%d", i+1)]))
		}
		b.Log(line)
	}
}
