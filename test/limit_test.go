package test

import (
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
)

// TestLimitedDiskMoves: a guest whose disk may move a byte a second, once the burst of
// 64 KiB is used up, waits for its requests. It is paused, resumed and migrated meanwhile;
// at the destination, where the command line says otherwise, its requests are carried out.
func TestLimitedDiskMoves(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	const size = 2 * mib
	image := newImage(t, size)
	here := h.start("run", "here", "--memory", "64M", "--disk", "path="+image+",bps=1,bps-burst=64K", "--cmdline",
		"fill=8M dirty=2M rate=50 verify=1 tick=0.5 disk=2M drate=0")
	const burst = 2 * 64 << 10 / mempage.Size // pages: the burst, and a request of the guest that is owed
	moved := func(k tick) uint64 { return k.more["dwrites"] + k.more["dreads"] }
	_, next := here.out.awaitTick(t, 0, "the burst", func(k tick) bool { return moved(k) >= burst })
	h.must("pause", "here")
	h.must("resume", "here")
	here.out.awaitTick(t, next, "the guest goes on", func(tick) bool { return true })

	there, addr := h.receive("there", "--disk", "path="+image+",iops=100000")
	r, exit := h.migrate("here", "--to", addr, "--downtime-limit", "3s")
	if exit != 0 || r.Status != "completed" {
		t.Fatalf("exit %d, %+v", exit, r)
	}
	for _, k := range here.out.ticks() {
		if moved(k) > burst {
			t.Errorf("%d pages were moved, and the limit is %d: %+v", moved(k), burst, k)
		}
	}
	if out := h.must("info", "there"); !strings.Contains(out, "at most 100000 operations/s") || strings.Contains(out, "1 B/s") {
		t.Errorf("expected the limit of the receiver alone:\n%s", out)
	}
	awaitDisk(t, there.out, 0, size/mempage.Size)
	h.must("stop", "--force", "there")
	if exit := there.wait(); exit != 0 {
		t.Errorf("exit %d", exit)
	}
	checkImage(t, image, size/mempage.Size)
}

// TestAntispoofIsTheHosts: a guest talks by its own address where that was given, and by no
// other. What passes after a migration is what the receiver's command line says.
func TestAntispoofIsTheHosts(t *testing.T) {
	needKVM(t)
	a, _ := newSites(t)
	here := a.start("run", "s0", "--memory", "64M", "--net", "tap=tap1,bridge=br0,antispoof,ip="+guestIP, "--cmdline", "fill=8M tick=0.5 ip="+guestIP)
	here.out.awaitText(t, 0, "filled ")
	client := a.echo(t)
	client.await(t, 5)
	foreign := regexp.MustCompile(`"tx_foreign": *[1-9]`)
	if out := a.must("info", "s0", "--json"); foreign.MatchString(out) {
		t.Errorf("frames of the guest's own address were refused:\n%s", out)
	}

	there := a.start("receive", "s1", "--listen", a.ip+":0", "--insecure", "--net", "tap=tap2,bridge=br0,antispoof,ip=10.9.0.99")
	line := there.err.awaitText(t, 0, "listening on ")
	_, addr, _ := strings.Cut(there.err.snapshot()[line], "listening on ")
	if r, exit := a.migrate("s0", "--to", strings.TrimSpace(addr), "--downtime-limit", "3s"); exit != 0 {
		t.Fatalf("%+v", r)
	}
	here.wait()
	client.mu.Lock()
	from := len(client.sent)
	client.mu.Unlock()
	for end := time.Now().Add(patience); !foreign.MatchString(a.must("info", "s1", "--json")); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no frame of another address was refused")
		}
	}
	there.out.awaitTick(t, there.out.len(), "the guest goes on", func(tick) bool { return true })
	client.end()
	client.mu.Lock()
	defer client.mu.Unlock()
	for n := range client.answered {
		if int(n) >= from {
			t.Errorf("packet %d of %d was answered from an address that is not the guest's here", n, len(client.sent))
		}
	}
}
