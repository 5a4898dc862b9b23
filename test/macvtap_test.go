package test

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// macvtapSite is a site with a link for macvtaps, v0, whose other end is a port of its bridge.
func macvtapSite(t *testing.T) (a, b *site) {
	t.Helper()
	a, b = newSites(t)
	a.inside("link", "add", "v0", "type", "veth", "peer", "name", "v1")
	a.inside("link", "set", "v1", "master", "br0", "up")
	a.inside("link", "set", "v0", "up")
	out, err := exec.Command("ip", "-n", a.ns, "link", "add", "link", "v0", "name", "probe", "type", "macvtap").CombinedOutput()
	if err != nil && strings.Contains(string(out), "Unknown device type") {
		t.Skip("SKIPPED: the kernel has no macvtap; test/svm has")
	} else if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	a.inside("link", "del", "probe")
	return a, b
}

// macvtaps are the names of those at the site.
func (s *site) macvtaps() string {
	s.t.Helper()
	out, err := exec.Command("ip", "-n", s.ns, "-br", "link", "show", "type", "macvtap").CombinedOutput()
	if err != nil {
		s.t.Fatalf("%v: %s", err, out)
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		name, _, _ := strings.Cut(line, "@")
		names = append(names, name)
	}
	return strings.Join(names, " ")
}

// awaitMacvtaps waits until the site has these.
func (s *site) awaitMacvtaps(want string) {
	s.t.Helper()
	for limit := time.Now().Add(patience); s.macvtaps() != want; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(limit) {
			s.t.Fatalf("the host has the macvtaps %q, expected %q", s.macvtaps(), want)
		}
	}
}

// TestMacvtapMoves: a guest on a macvtap that govmm made moves to another of the same link,
// to one that was made before, to a tap of another host, and back. It answers throughout,
// with its address; what govmm made is gone afterwards, also if its process is killed.
func TestMacvtapMoves(t *testing.T) {
	needKVM(t)
	a, b := macvtapSite(t)
	a.inside("link", "add", "link", "v0", "name", "ready", "type", "macvtap", "mode", "bridge")
	const mac = "52:54:00:09:00:02"
	here := a.start("run", "e0", "--memory", "64M", "--net", "macvtap=v0,mac="+mac, "--cmdline", "fill=8M dirty=2M rate=50 verify=1 tick=0.5 ip="+guestIP)
	here.out.awaitText(t, 0, "filled ")
	pings := startPing(t, a, guestIP)
	pings.await(5)
	client := a.echo(t)
	client.await(t, 5)
	at, allowed := a, 0
	for _, move := range []struct {
		name, net string
		to        *site
		left      string // the macvtaps at the first site when it has moved
	}{
		{"e1", "macvtap=v0,name=second", a, "ready second"},
		{"e2", "macvtap=ready", a, "ready"},
		{"e3", "tap=tap0,bridge=br0", b, "ready"},
		{"e4", "macvtap=v0", a, "ready govmm0"},
	} {
		there := move.to.start("receive", move.name, "--listen", move.to.ip+":0", "--insecure", "--net", move.net)
		line := there.err.awaitText(t, 0, "listening on ")
		_, addr, _ := strings.Cut(there.err.snapshot()[line], "listening on ")
		before := client.await(t, 1)
		r, exit := at.migrate("e"+string(move.name[1]-1), "--to", strings.TrimSpace(addr), "--downtime-limit", "3s")
		if exit != 0 || r.Status != "completed" {
			t.Fatalf("%s: exit %d, %+v", move.net, exit, r)
		}
		here.wait()
		after := client.await(t, 5)
		there.out.awaitTick(t, 0, "the guest has announced itself", func(k tick) bool { return k.more["announced"] > 0 })
		allowed += int(time.Duration(r.DowntimeMS*float64(time.Millisecond))/pingInterval) + 2
		t.Logf("%s: %d packets were not echoed, downtime %.0f ms", move.net, client.lost(before, after), r.DowntimeMS)
		a.awaitMacvtaps(move.left)
		awaitIRQs(t, there.out)
		here, at = there, move.to
	}
	client.end()
	if client.unexpected != 0 {
		t.Errorf("%d answers were not what was sent", client.unexpected)
	}
	sent, lost, twice := pings.end()
	t.Logf("%d pings, %d not answered, %d answered twice; the downtimes explain %d", sent, lost, twice, allowed)
	if lost > allowed || twice > 0 {
		t.Errorf("%d of %d pings were not answered, %d twice; the downtimes explain %d", lost, sent, twice, allowed)
	}
	here.kill(unix.SIGKILL)
	a.awaitMacvtaps("ready")
}

// TestMacvtapGoesOn: the process that takes over goes on with the macvtap, which is not gone
// until that ends; and a guest that is restored gets one.
func TestMacvtapGoesOn(t *testing.T) {
	needKVM(t)
	a, _ := macvtapSite(t)
	p := a.start("run", "u", "--memory", "64M", "--net", "macvtap=v0,queues=2", "--cmdline", "fill=8M tick=0.5 ip="+guestIP)
	p.out.awaitText(t, 0, "filled ")
	client := a.echo(t)
	client.await(t, 5)
	a.mustUpgrade("u")
	client.await(t, 5)
	a.awaitMacvtaps("govmm0")
	dir := filepath.Join(t.TempDir(), "s")
	a.mustSnapshot("u", "--to", dir, "--stop")
	a.awaitMacvtaps("")
	a.start("run", "v", "--from", dir, "--net", "macvtap=v0,name=again")
	client.await(t, 5)
	a.awaitMacvtaps("again")
	a.must("stop", "--force", "v")
	a.awaitMacvtaps("")
}
