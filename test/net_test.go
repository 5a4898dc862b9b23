package test

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const guestIP = "10.9.0.2"

// in runs f on a thread that is in the site's network namespace. Sockets that f
// opens are of that namespace.
func (s *site) in(t testing.TB, f func() error) {
	t.Helper()
	here, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	there, err := os.Open("/run/netns/" + s.ns)
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	runtime.LockOSThread()
	if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	err = f()
	if back := unix.Setns(int(here.Fd()), unix.CLONE_NEWNET); back != nil {
		t.Fatal(back) // the thread is not given back
	}
	runtime.UnlockOSThread()
	if err != nil {
		t.Fatal(err)
	}
}

// echoes sends a packet to the guest's UDP port 7 ten times a second and counts
// what comes back.
type echoes struct {
	conn       net.Conn
	stop       chan struct{}
	all        sync.WaitGroup
	mu         sync.Mutex // guards all below
	sent       []time.Time
	answered   map[uint32]bool
	unexpected int
}

// echo starts a client at the site that runs until the test ends.
func (s *site) echo(t testing.TB) *echoes {
	t.Helper()
	e := &echoes{stop: make(chan struct{}), answered: map[uint32]bool{}}
	s.in(t, func() (err error) {
		e.conn, err = net.Dial("udp", netip.MustParseAddrPort(guestIP+":7").String())
		return err
	})
	e.all.Go(e.send)
	e.all.Go(e.receive)
	t.Cleanup(e.end)
	return e
}

func (e *echoes) send() {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		e.mu.Lock()
		n := uint32(len(e.sent))
		e.sent = append(e.sent, time.Now())
		e.mu.Unlock()
		p := make([]byte, 100)
		for i := range len(p) / 4 {
			binary.BigEndian.PutUint32(p[4*i:], n+uint32(i))
		}
		_, _ = e.conn.Write(p) // an error of the packet before, such as no answer to ARP
		select {
		case <-tick.C:
		case <-e.stop:
			return
		}
	}
}

func (e *echoes) receive() {
	p := make([]byte, 2000)
	for {
		n, err := e.conn.Read(p)
		if err != nil {
			if strings.Contains(err.Error(), "closed") {
				return
			}
			continue // ICMP says that it could not be delivered
		}
		first := binary.BigEndian.Uint32(p)
		good := n == 100
		for i := 0; good && i < 25; i++ {
			good = binary.BigEndian.Uint32(p[4*i:]) == first+uint32(i)
		}
		e.mu.Lock()
		if good && int(first) < len(e.sent) {
			e.answered[first] = true
		} else {
			e.unexpected++
		}
		e.mu.Unlock()
	}
}

func (e *echoes) end() {
	select {
	case <-e.stop:
		return
	default:
	}
	close(e.stop)
	_ = e.conn.Close()
	e.all.Wait()
}

// await waits until n packets sent from now on are answered, one after the
// other, and returns the number of the first of them.
func (e *echoes) await(t testing.TB, n int) int {
	t.Helper()
	e.mu.Lock()
	from := len(e.sent)
	e.mu.Unlock()
	for limit := time.Now().Add(patience); time.Now().Before(limit); time.Sleep(20 * time.Millisecond) {
		e.mu.Lock()
		run := 0
		for i := from; i < len(e.sent) && run < n; i++ {
			run++
			if !e.answered[uint32(i)] {
				run = 0
			}
			if run == n {
				e.mu.Unlock()
				return i - n + 1
			}
		}
		e.mu.Unlock()
	}
	t.Fatalf("the guest does not answer %d packets in a row", n)
	return 0
}

// lost counts the packets of numbers [from, to) that were not answered.
func (e *echoes) lost(from, to int) (n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := from; i < to; i++ {
		if !e.answered[uint32(i)] {
			n++
		}
	}
	return n
}

// guestPort is the port of a site's bridge behind which the guest is.
func (s *site) guestPort(t testing.TB, mac net.HardwareAddr) (port string) {
	t.Helper()
	s.in(t, func() error {
		all, err := netlink.NeighList(0, unix.AF_BRIDGE)
		if err != nil {
			return err
		}
		for _, n := range all {
			if n.HardwareAddr.String() == mac.String() && n.MasterIndex != 0 {
				link, err := netlink.LinkByIndex(n.LinkIndex)
				if err != nil {
					return err
				}
				port = link.Attrs().Name
			}
		}
		return nil
	})
	return port
}

// A guest that answers ARP, ping and UDP echo moves between two sites whose
// bridges are joined, there and back, while clients at the first site go on
// asking. The bridges learn where it is, and it is asked to announce itself.
func TestNetMoves(t *testing.T) {
	needKVM(t)
	a, b := newSites(t)
	mac, _ := net.ParseMAC("52:54:00:09:00:02")
	here := a.start("run", "e0", "--memory", "64M", "--net", "tap=tap0,bridge=br0,mac="+mac.String(), "--cmdline",
		"fill=8M dirty=2M rate=50 verify=1 tick=0.5 ip="+guestIP)
	here.out.awaitText(t, 0, "filled ")
	pings := startPing(t, a, guestIP)
	pings.await(5)
	client := a.echo(t)
	client.await(t, 5)
	at, to := a, b
	var allowed int
	for i := range count(2, 10) {
		there := to.start("receive", fmt.Sprintf("e%d", i+1), "--listen", to.ip+":0", "--insecure", "--net", "tap=tap0,bridge=br0")
		line := there.err.awaitText(t, 0, "listening on ")
		_, addr, _ := strings.Cut(there.err.snapshot()[line], "listening on ")
		before := client.await(t, 1)
		r, exit := at.migrate(fmt.Sprintf("e%d", i), "--to", strings.TrimSpace(addr), "--downtime-limit", "3s")
		if exit != 0 || r.Status != "completed" {
			t.Fatalf("migration %d: exit %d, %+v", i, exit, r)
		}
		here.wait()
		after := client.await(t, 5)
		there.out.awaitTick(t, 0, "the guest has announced itself", func(k tick) bool { return k.more["announced"] > 0 })
		lost := client.lost(before, after)
		// Packets sent while it stood still, and one on either side of that.
		allowed += int(time.Duration(r.DowntimeMS*float64(time.Millisecond))/pingInterval) + 2
		t.Logf("migration %d: %d packets were not echoed, downtime %.0f ms", i, lost, r.DowntimeMS)
		if port := to.guestPort(t, mac); port != "tap0" {
			t.Errorf("migration %d: the bridge where the guest is has it behind %q", i, port)
		}
		if port := at.guestPort(t, mac); port != "cable" {
			t.Errorf("migration %d: the bridge where the guest was has it behind %q", i, port)
		}
		pings.await(5)
		awaitIRQs(t, there.out)
		here, at, to = there, to, at
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
}

// TestNetMovesOnOneHost: both processes are on one host, with taps of one bridge, or
// with queues of one tap. While the guest runs at the source, the destination takes no
// packet from it; no packet is answered twice, and none is lost but what the downtime
// explains, also if the first destination dies on the way.
func TestNetMovesOnOneHost(t *testing.T) {
	needKVM(t)
	for name, taps := range map[string][3]string{"taps": {"tap1", "tap2", "tap3"}, "queues": {"mq0", "mq0", "mq0"}} {
		t.Run(name, func(t *testing.T) {
			a, _ := newSites(t)
			if name == "queues" {
				a.inside("tuntap", "add", "mq0", "mode", "tap", "vnet_hdr", "multi_queue")
			}
			here := a.start("run", "e0", "--memory", "64M", "--net", "tap="+taps[0]+",bridge=br0", "--cmdline",
				"fill=32M dirty=1M rate=50 verify=1 tick=0.5 ip="+guestIP)
			here.out.awaitText(t, 0, "filled ")
			pings := startPing(t, a, guestIP)
			pings.await(3)
			client := a.echo(t)
			client.await(t, 5)
			receive := func(name, tap string) (*proc, string) {
				there := a.start("receive", name, "--listen", a.ip+":0", "--insecure", "--net", "tap="+tap+",bridge=br0")
				line := there.err.awaitText(t, 0, "listening on ")
				_, addr, _ := strings.Cut(there.err.snapshot()[line], "listening on ")
				return there, strings.TrimSpace(addr)
			}
			dies, addr := receive("dies", taps[1])
			from := client.await(t, 1)
			mig := a.start("migrate", "e0", "--to", addr, "--bandwidth-limit", "2M", "--json")
			a.awaitMigrating("e0", mib)
			dies.kill(unix.SIGKILL)
			if mig.wait() == 0 {
				t.Fatal("migrated to one that was killed")
			}
			there, addr := receive("e1", taps[2])
			r, exit := a.migrate("e0", "--to", addr, "--downtime-limit", "3s", "--bandwidth-limit", "16M")
			if exit != 0 {
				t.Fatalf("%+v", r)
			}
			here.wait()
			to := client.await(t, 5)
			there.out.awaitTick(t, 0, "the guest has announced itself", func(k tick) bool { return k.more["announced"] > 0 })
			allowed := int(time.Duration(r.DowntimeMS*float64(time.Millisecond))/pingInterval) + 2
			echoes := client.lost(from, to)
			client.end()
			sent, lost, twice := pings.end()
			t.Logf("%d of %d pings and %d of %d packets were not answered, %d pings twice; the downtime explains %d", lost, sent, echoes, to-from, twice, allowed)
			if lost > allowed || echoes > allowed || twice > 0 || client.unexpected > 0 {
				t.Errorf("%d and %d were not answered, %d twice; the downtime explains %d of each", lost, echoes, twice, allowed)
			}
		})
	}
}

// TestTapGoneAtTheSource: a guest whose tap was deleted has no link, and has one again
// where it moves to a tap that is there.
func TestTapGoneAtTheSource(t *testing.T) {
	needKVM(t)
	a, _ := newSites(t)
	here := a.start("run", "g0", "--memory", "64M", "--net", "tap=tap1,bridge=br0", "--cmdline", "fill=8M tick=0.5 ip="+guestIP)
	here.out.awaitText(t, 0, "tick 1 ")
	client := a.echo(t)
	client.await(t, 3)
	a.inside("link", "del", "tap1")
	here.err.awaitText(t, 0, "the guest's link is down")
	there := a.start("receive", "g1", "--listen", a.ip+":0", "--insecure", "--net", "tap=tap2,bridge=br0")
	line := there.err.awaitText(t, 0, "listening on ")
	_, addr, _ := strings.Cut(there.err.snapshot()[line], "listening on ")
	if r, exit := a.migrate("g0", "--to", strings.TrimSpace(addr), "--downtime-limit", "3s"); exit != 0 {
		t.Fatalf("%+v", r)
	}
	client.await(t, 3)
}
