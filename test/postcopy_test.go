package test

import (
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
)

// postcopyResult is what migrate --json prints of memory that came after the guest.
type postcopyResult struct {
	Pages      uint64  `json:"pages"`
	DurationMS float64 `json:"duration_ms"`
	Faults     uint64  `json:"faults"`
	Local      uint64  `json:"faults_local"`
	P50        float64 `json:"fault_p50_ms"`
	P99        float64 `json:"fault_p99_ms"`
	Longest    float64 `json:"fault_longest_ms"`
	Recoveries int     `json:"recoveries"`
}

// TestPostcopyThereAndBack: a guest with two vCPUs, a disk and a balloon, which hints
// pages, takes some back and rewrites memory flat out, moves there and back, before and
// after all of its memory has, in memory of each kind. No page is bad, and no tick is missing.
// The destination opens a tap, and gives up a capability when the guest is there.
func TestPostcopyThereAndBack(t *testing.T) {
	needKVM(t)
	needRoot(t)
	h := newHost(t)
	image := newImage(t, 8*mib)
	reserveHugePages(t, 2*256/2+8)
	const owned = 96 * mib / mempage.Size
	here := h.start("run", "p0", "--cpus", "2", "--memory", "256M", "--disk", image, "--net", "tap", "--cmdline",
		"fill=96M dirty=64M rate=0 verify=1 tick=0.5 pool=64M keep=16M hintrace reports=0 disk=2M drate=0")
	here.out.awaitText(t, 0, "is ready in")
	awaitVerified(t, here.out, 0, owned)
	last := here.out.ticks()[len(here.out.ticks())-1]
	early := 0
	for i := range count(6, 50) {
		there, addr := h.receive(fmt.Sprintf("p%d", i+1), "--disk", image, "--net", "tap", "--memory-backing", []string{"anonymous", "memfd", "hugetlb"}[i/2%3])
		args := []string{fmt.Sprintf("p%d", i), "--to", addr, "--downtime-limit", "20ms", "--bandwidth-limit", "200M"}
		if i%3 != 2 {
			args = append(args, "--postcopy="+[]string{"1", "auto"}[i%2])
		} else {
			args = append(args, "--downtime-limit", "3s")
		}
		r, exit := h.migrate(args...)
		if exit != 0 || r.Status != "completed" {
			t.Fatalf("migration %d: exit %d, %+v", i, exit, r)
		}
		if r.Postcopy != nil {
			early++
			t.Logf("migration %d: %+v, downtime %.1f ms", i, *r.Postcopy, r.DowntimeMS)
		}
		if here.wait() != 0 {
			t.Errorf("migration %d: the source exits %d", i, here.exit)
		}
		if all := here.out.ticks(); len(all) > 0 {
			last = all[len(all)-1]
		}
		awaitChecked(t, there.out, owned)
		if cut, ok := parseTick(here.out.tail(1) + there.out.snapshot()[0]); ok {
			last = cut
		}
		if first := there.out.ticks()[0]; first.n != last.n+1 {
			t.Errorf("migration %d: tick %d follows tick %d", i, first.n, last.n)
		}
		for _, line := range there.out.snapshot() {
			if strings.Contains(line, "bad page") || strings.Contains(line, "bad notes") {
				t.Error(line)
			}
		}
		here = there
	}
	if early == 0 {
		t.Error("no guest moved before all of its memory had")
	}
}

// wire passes connections on until it is cut, and again after it was mended.
type wire struct {
	to string

	mu    sync.Mutex // guards the fields below
	ln    net.Listener
	conns []net.Conn
	all   sync.WaitGroup
}

func newWire(t testing.TB, to string) *wire {
	w := &wire{to: to}
	w.mend(t, "127.0.0.1:0")
	t.Cleanup(func() { w.cut(); w.all.Wait() })
	return w
}

// mend listens at an address, and returns it.
func (w *wire) mend(t testing.TB, at string) string {
	t.Helper()
	ln, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	w.ln = ln
	w.mu.Unlock()
	w.all.Go(func() {
		for {
			a, err := ln.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", w.to)
			if err != nil {
				a.Close()
				continue
			}
			w.mu.Lock()
			w.conns = append(w.conns, a, b)
			w.mu.Unlock()
			for _, pair := range [][2]net.Conn{{a, b}, {b, a}} {
				w.all.Go(func() {
					_, _ = io.Copy(pair[0], pair[1])
					a.Close()
					b.Close()
				})
			}
		}
	})
	return ln.Addr().String()
}

// cut ends all connections, and refuses more.
func (w *wire) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ln.Close()
	for _, c := range w.conns {
		c.Close()
	}
	w.conns = nil
}

// awaitPostcopy waits until the guest has moved, and its memory follows.
func (h *host) awaitPostcopy(name string) {
	h.t.Helper()
	h.awaitInfo(name, "phase postcopy", func(i info) bool { return i.Migration.Phase == "postcopy" })
}

// startSlow starts a guest of which not all memory follows at once because it touches it.
func (h *host) startSlow(name string) *proc {
	h.t.Helper()
	p := h.start("run", name, "--cpus", "2", "--memory", "128M", "--cmdline", "fill=96M dirty=96M rate=3000 verify=1 tick=0.5")
	p.out.awaitText(h.t, 0, "filled ")
	return p
}

// TestPostcopyRecovers: the network goes away while memory follows the guest, and comes
// back: by itself the source reaches the destination again, or by --recover at another
// address. No page is lost; over TLS too.
func TestPostcopyRecovers(t *testing.T) {
	needKVM(t)
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("tls=%v", secure), func(t *testing.T) {
			h := newHost(t)
			const owned = 96 * mib / mempage.Size
			here := h.startSlow("r0")
			awaitVerified(t, here.out, 0, owned)
			var receives, more []string
			if secure {
				a := newAuthority(t)
				receives = []string{"--tls-dir", a.host("127.0.0.1"), "--tls-allow", "127.0.0.1"}
				more = []string{"--tls-dir", a.host("127.0.0.1")}
			}
			there, addr := h.receive("r1", receives...)
			w := newWire(t, addr)
			at := w.ln.Addr().String()
			m := h.start(append([]string{"migrate", "r0", "--json", "--to", at, "--postcopy=1", "--downtime-limit", "5ms", "--bandwidth-limit", "30M"}, more...)...)
			h.awaitPostcopy("r0")
			w.cut()
			there.err.awaitText(t, 0, "the guest stands still where it needs it")
			h.awaitInfo("r0", "a lost connection", func(i info) bool { return strings.Contains(i.Migration.Error, "connection lost") })
			if _, errs, exit := h.run("migrate", "r0", "--cancel"); exit == 0 || !strings.Contains(errs, "too late") {
				t.Errorf("cancel while memory is missing: exit %d, %q", exit, errs)
			}
			if _, errs, exit := h.run("resume", "r0", "--force"); exit == 0 || !strings.Contains(errs, "lacks memory that is here") {
				t.Errorf("resume --force while memory is missing: exit %d, %q", exit, errs)
			}
			if _, errs, exit := h.run("migrate", "r1", "--to", "127.0.0.1:9"); exit == 0 || !strings.Contains(errs, "have not come yet") {
				t.Errorf("a second migration while memory is missing: exit %d, %q", exit, errs)
			}
			w.mend(t, at) // found by itself
			h.awaitInfo("r0", "the connection again", func(i info) bool { return i.Migration.Error == "" })
			w.cut()
			h.awaitInfo("r0", "a connection that is lost again", func(i info) bool { return strings.Contains(i.Migration.Error, "connection lost") })
			other := w.mend(t, "127.0.0.1:0")
			h.must("migrate", "r0", "--recover", "--to", other)
			if m.wait() != 0 {
				t.Fatalf("exit %d: %s", m.exit, m.err.tail(3))
			}
			r := decodeResult(t, m.out.tail(1), m.err.tail(5))
			if r.Postcopy == nil || r.Postcopy.Recoveries < 2 {
				t.Errorf("%+v", r.Postcopy)
			}
			if text := m.err.tail(10); !strings.Contains(text, "needs the processes of both hosts") {
				t.Errorf("nobody was told what cannot be survived: %q", text)
			}
			awaitVerified(t, there.out, 0, owned)
			if here.wait() != 0 {
				t.Errorf("the source exits %d", here.exit)
			}
		})
	}
}

// TestPostcopyKilled: the death of either process while memory is missing is not survived:
// the guest does not run at the source again, and stands still at the destination.
func TestPostcopyKilled(t *testing.T) {
	needKVM(t)
	for range count(1, 50) {
		for _, victim := range []string{"source", "destination"} {
			h := newHost(t)
			here := h.startSlow("k0")
			there, addr := h.receive("k1")
			m := h.start("migrate", "k0", "--json", "--to", addr, "--postcopy=1", "--downtime-limit", "5ms", "--bandwidth-limit", "20M")
			h.awaitPostcopy("k0")
			if victim == "source" {
				here.kill(syscall.SIGKILL)
				there.err.awaitText(t, 0, "the guest stands still where it needs it")
				if m.wait() == 0 {
					t.Error("the migration of a source that was killed is completed")
				}
				h.must("stop", "--force", "k1")
				there.wait()
				continue
			}
			there.kill(syscall.SIGKILL)
			h.awaitInfo("k0", "a lost connection", func(i info) bool { return strings.Contains(i.Migration.Error, "connection lost") })
			if s := h.info("k0").State; s == "running" || s == "paused" {
				t.Errorf("the source is %s", s)
			}
			h.must("stop", "--force", "k0")
			if m.wait() == 0 {
				t.Error("a migration whose destination was killed is completed")
			}
			if here.wait(); strings.Contains(here.err.tail(5), "panic") {
				t.Error(here.err.tail(5))
			}
		}
	}
}

// TestPostcopyNeverConverges: a guest that rewrites more than its link carries moves
// nevertheless, stands still for no longer than the limit, and goes on meanwhile.
func TestPostcopyNeverConverges(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	mem, fill, rate := 192, 160, "60M"
	if full() {
		mem, fill, rate = 3072, 2560, "500M"
	}
	here := h.startDemo("n0", 2, mem, fill, fill*4/5)
	there, addr := h.receive("n1")
	began := time.Now()
	r, exit := h.migrate("n0", "--to", addr, "--postcopy", "--bandwidth-limit", rate)
	if exit != 0 || r.Postcopy == nil {
		t.Fatalf("exit %d, %+v", exit, r)
	}
	k, _ := awaitVerified(t, there.out, 0, uint64(fill)*mib/mempage.Size)
	if here.wait() != 0 || k.bad != 0 {
		t.Errorf("the source exits %d, %+v", here.exit, k)
	}
	t.Logf("total %d ms (%v), downtime %.1f ms, %+v", r.TotalMS, time.Since(began), r.DowntimeMS, *r.Postcopy)
	for i, k := range there.out.ticks() {
		if i < 12 {
			t.Logf("up %.1f: %d writes, gap %.1f ms", k.up, k.writes, k.gap)
		}
	}
}
