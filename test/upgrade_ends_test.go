package test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestUpgradeKeepsClients: a client of the serial port's socket stays connected, and reads
// every tick once.
func TestUpgradeKeepsClients(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	path := filepath.Join(h.dir, "line")
	h.start("run", "a", "--memory", "64M", "--memory-backing", "memfd", "--serial", "unix:"+path, "--cmdline", "fill=8M dirty=1M rate=0 verify=1 tick=0.2")
	var c net.Conn
	for limit := time.Now().Add(patience); c == nil && time.Now().Before(limit); time.Sleep(5 * time.Millisecond) {
		c, _ = net.Dial("unix", path)
	}
	if c == nil {
		t.Fatal("no serial port")
	}
	defer c.Close()
	l := newLines()
	go l.from(c)
	l.awaitText(t, 0, "filled ")
	for i := range count(5, 20) {
		from := l.len()
		h.mustUpgrade("a")
		l.awaitTick(t, from+1, fmt.Sprintf("after upgrade %d", i), func(tick) bool { return true })
	}
	if _, err := c.Write([]byte("help\n")); err != nil {
		t.Fatal(err)
	}
	l.awaitText(t, 0, "poweroff, reboot")
	c.Close()
	h.mustUpgrade("a") // with nobody connected
	time.Sleep(300 * time.Millisecond)
	h.mustUpgrade("a")
	again, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	more := newLines()
	go more.from(again)
	more.awaitTick(t, 1, "for the next client", func(tick) bool { return true })
	all := append(l.ticks(), more.ticks()...)
	for i, k := range all {
		if i > 0 && k.n < all[i-1].n || k.bad != 0 {
			t.Errorf("tick %d follows tick %d, %d bad", k.n, all[max(i-1, 0)].n, k.bad)
		}
	}
}

// TestUpgradeTap: the tap goes along, with one queue or several, made by govmm or before: no
// answer is lost but what the downtime explains.
func TestUpgradeTap(t *testing.T) {
	needKVM(t)
	for name, opt := range map[string]string{"made": "tap=tap0", "there": "tap=there0", "queues": "tap=mq0,queues=2"} {
		t.Run(name, func(t *testing.T) {
			a, _ := newSites(t)
			a.inside("tuntap", "add", "there0", "mode", "tap", "vnet_hdr")
			a.inside("tuntap", "add", "mq0", "mode", "tap", "vnet_hdr", "multi_queue")
			p := a.start("run", "e0", "--memory", "64M", "--memory-backing", "memfd", "--net", opt+",bridge=br0", "--cmdline",
				"fill=16M dirty=1M rate=50 verify=1 tick=0.5 ip="+guestIP)
			p.out.awaitText(t, 0, "filled ")
			client := a.echo(t)
			client.await(t, 5)
			n, allowed := count(4, 20), 0
			from := client.await(t, 1)
			for range n {
				r := a.mustUpgrade("e0")
				allowed += int(time.Duration(r.DowntimeMS*float64(time.Millisecond))/(100*time.Millisecond)) + 1
				client.await(t, 3)
			}
			lost := client.lost(from, client.await(t, 5))
			client.end()
			t.Logf("%d upgrades: %d packets were not echoed, the downtimes explain %d", n, lost, allowed)
			if lost > allowed || client.unexpected > 0 {
				t.Errorf("%d packets were not echoed, the downtimes explain %d; %d answers were not what was sent", lost, allowed, client.unexpected)
			}
			awaitIRQs(t, p.out)
			checkTicks(t, p)
		})
	}
}

// TestUpgradeAsUser: the new process is the VM's user, whoever runs the command, and in the
// sandbox.
func TestUpgradeAsUser(t *testing.T) {
	needKVM(t)
	needRoot(t)
	h := newHost(t)
	if err := os.Chmod(h.dir, 0o777); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(h.dir, "theirs")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, "disk.img")
	err := os.WriteFile(image, make([]byte, 8*mib), 0o600)
	if err == nil {
		err = os.Chown(image, 65534, 65534)
	}
	if err == nil {
		err = os.Chmod(filepath.Dir(govmm), 0o755) // that user starts it
	}
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "a.sock")
	p := h.start("run", "a", "--user", "65534:65534", "--api-socket", socket, "--memory", "64M", "--memory-backing", "memfd", "--disk", image,
		"--cmdline", "fill=8M dirty=1M rate=0 verify=1 tick=0.5 disk=1M")
	p.out.awaitText(t, 0, "filled ")
	for range 2 {
		r := h.mustUpgrade("--api-socket", socket)
		status := must(os.ReadFile(fmt.Sprintf("/proc/%d/status", r.PID)))
		for _, want := range []string{"Uid:\t65534\t65534\t65534\t65534", "Gid:\t65534\t65534\t65534\t65534", "Seccomp:\t2", "CapPrm:\t0000000000000000"} {
			if !strings.Contains(status, want) {
				t.Errorf("the new process lacks %q:\n%s", want, status)
			}
		}
		awaitDisk(t, p.out, p.out.len(), 1)
	}
	h.must("stop", "--force", "--api-socket", socket)
	if p.wait() != 0 {
		t.Errorf("exit %d", p.exit)
	}
	checkTicks(t, p)
}
