package test

import (
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/test/kernel"
)

// pingInterval is the pinger's, ten packets a second.
const pingInterval = 100 * time.Millisecond

// TestLinuxPing: the guest's kernel answers ping through tap and bridge while it
// moves between two network namespaces, whose bridges learn by themselves where
// it is. No more packets are lost than its downtimes explain.
func TestLinuxPing(t *testing.T) {
	needKVM(t)
	a, b := newSites(t)
	const guest = everyDeviceIP
	disk := content(t, 8*mib)
	booted := everyDevice().booted(t, "--disk", disk, "--net", "tap")
	vm := booted.restore(a.host, "at0", "--disk", disk, "--net", "tap=tap0,bridge=br0")
	r := vm.awaitBoot()

	p := startPing(t, a, guest)
	p.await(10)
	var allowed int
	at := a
	for i := range 5 {
		to := b
		if at == b {
			to = a
		}
		name := fmt.Sprintf("at%d", i+1)
		// The tap of the guest that has left is gone by the time that the next
		// is made, so that both may have its name.
		next := to.start("receive", name, "--listen", to.ip+":0", "--insecure", "--disk", disk, "--net", "tap=tap0,bridge=br0")
		line := next.err.awaitText(t, 0, "listening on ")
		_, addr, _ := strings.Cut(next.err.snapshot()[line], "listening on ")
		got, exit := at.migrate(fmt.Sprintf("at%d", i), "--to", strings.TrimSpace(addr), "--downtime-limit", "3s")
		if exit != 0 || got.Status != "completed" {
			t.Fatalf("migration %d: exit %d, %+v", i, exit, got)
		}
		vm.wait()
		// Packets sent while the guest stood still may be lost, and one on
		// either side of that.
		allowed += int(time.Duration(got.DowntimeMS*float64(time.Millisecond))/pingInterval) + 2
		p.await(10) // the bridges have learnt the new port
		r = next.goesOn(r)
		next.quietly(0)
		t.Logf("migration %d to %s: downtime %.1f ms", i, to.ns, got.DowntimeMS)
		vm, at = next, to
	}
	sent, lost, twice := p.end()
	t.Logf("%d packets sent, %d lost, %d answered twice; the downtimes explain %d", sent, lost, twice, allowed)
	if lost > allowed {
		t.Errorf("%d of %d packets were lost, the downtimes explain %d", lost, sent, allowed)
	}
	if twice > 0 {
		t.Errorf("%d packets were answered twice", twice)
	}
}

// pinger is a ping that goes on.
type pinger struct {
	t    testing.TB
	cmd  *exec.Cmd
	out  *lines
	done chan struct{}
}

func startPing(t testing.TB, from *site, to string) *pinger {
	t.Helper()
	cmd := exec.Command("ip", "netns", "exec", from.ns, "ping", "-n", "-i", fmt.Sprint(pingInterval.Seconds()), to)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &pinger{t: t, cmd: cmd, out: newLines(), done: make(chan struct{})}
	go func() {
		p.out.from(out)
		_ = cmd.Wait() // it exits 1 if a packet was lost
		close(p.done)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-p.done
	})
	return p
}

var pingReply = regexp.MustCompile(`icmp_seq=(\d+) ttl=`)

// await waits for n replies more.
func (p *pinger) await(n int) {
	p.t.Helper()
	from := p.out.len()
	for range n {
		from = p.out.await(p.t, from, "reply to a ping", pingReply.MatchString) + 1
	}
}

// end stops the ping and counts: the packets before the last that was answered,
// how many of them were not, and how many more than once.
func (p *pinger) end() (sent, lost, twice int) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGINT); err != nil {
		p.t.Fatal(err)
	}
	<-p.done
	seen := map[int]int{}
	for _, s := range p.out.snapshot() {
		if m := pingReply.FindStringSubmatch(s); m != nil {
			n, _ := strconv.Atoi(m[1])
			seen[n]++
			sent = max(sent, n)
			if seen[n] > 1 {
				twice++
			}
		}
	}
	return sent, sent - len(seen), twice
}

// TestLinuxOnUserNet: Linux, whose driver asks for offloads, has a user network, in the sandbox.
func TestLinuxOnUserNet(t *testing.T) {
	needKVM(t)
	t.Parallel()
	l := linux{variant: kernel.NoACPI, cpus: 1, memory: "128M", program: "memhog", words: "size=4M",
		kernel: "ip=192.168.127.2::192.168.127.1:255.255.255.0::eth0:off", args: []string{"--net", fmt.Sprintf("user,forward=udp:%d:7", udpPort(t))}}
	h := newHost(t)
	vm := l.run(h, "linux", l.prepare(t))
	vm.awaitBoot()
	if _, workers := networks(t, vm.cmd.Process.Pid); len(workers) != 1 {
		t.Errorf("processes of the network: %v, expected one", workers)
	}
}
