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
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// site is a host of the tests with a network of its own: a namespace with a
// bridge br0, which has an address, and, joined with it by a veth pair, another
// site's bridge.
type site struct {
	*host
	ns netns.NsHandle
}

const (
	guestIP = "10.9.0.2"
	siteIP  = "10.9.0.1" // plus the site's number times ten
)

// newSites makes two sites whose bridges are joined.
func newSites(t *testing.T) (a, b *site) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("NOT TESTED: taps and network namespaces need root")
	}
	sites := make([]*site, 2)
	for i := range sites {
		s := &site{host: newHost(t)}
		runtime.LockOSThread()
		here, err := netns.Get()
		if err == nil {
			s.ns, err = netns.New()
		}
		if err == nil {
			err = s.furnish(fmt.Sprintf("10.9.0.%d/24", 1+10*i))
			if back := netns.Set(here); back != nil {
				t.Fatal(back) // the thread is not given back
			}
		}
		runtime.UnlockOSThread()
		if err != nil {
			t.Fatalf("network namespace: %v", err)
		}
		t.Cleanup(func() { _ = s.ns.Close() }) // it ends with the last process in it
		sites[i] = s
	}
	sites[0].in(t, func() error { return join(sites[1]) })
	sites[1].in(t, func() error { return enslave("v1") })
	return sites[0], sites[1]
}

// furnish makes the bridge. The namespace is the thread's.
func (s *site) furnish(addr string) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "br0"
	br := &netlink.Bridge{LinkAttrs: attrs}
	if err := netlink.LinkAdd(br); err != nil {
		return err
	}
	a, err := netlink.ParseAddr(addr)
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(br, a); err != nil {
		return err
	}
	return netlink.LinkSetUp(br)
}

// join makes a veth pair from this thread's namespace to another site.
func join(other *site) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "v0"
	pair := &netlink.Veth{LinkAttrs: attrs, PeerName: "v1", PeerNamespace: netlink.NsFd(other.ns)}
	if err := netlink.LinkAdd(pair); err != nil {
		return err
	}
	return enslave("v0")
}

func enslave(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	br, err := netlink.LinkByName("br0")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetMaster(link, br); err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

// in runs f on a thread that is in the site's namespace. What f starts or opens
// is of that namespace, too.
func (s *site) in(t testing.TB, f func() error) {
	t.Helper()
	runtime.LockOSThread()
	here, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	if err := netns.Set(s.ns); err != nil {
		t.Fatal(err)
	}
	err = f()
	if back := netns.Set(here); back != nil {
		t.Fatal(back)
	}
	runtime.UnlockOSThread()
	if err != nil {
		t.Fatal(err)
	}
}

// start runs govmm in the site until the test ends.
func (s *site) start(args ...string) (p *proc) {
	s.t.Helper()
	s.in(s.t, func() error { p = s.host.start(args...); return nil })
	return p
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

// ping sends ICMP echo requests from a site until one is answered.
func (s *site) ping(t testing.TB) {
	t.Helper()
	s.in(t, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
			return err
		}
		to := &unix.SockaddrInet4{Addr: netip.MustParseAddr(guestIP).As4()}
		request := []byte{8, 0, 0, 0, 0x67, 0x76, 0, 1, 'g', 'o', 'v', 'm', 'm', 0}
		sum := uint32(0)
		for i := 0; i < len(request); i += 2 {
			sum += uint32(request[i])<<8 | uint32(request[i+1])
		}
		binary.BigEndian.PutUint16(request[2:], ^uint16(sum+sum>>16))
		for limit := time.Now().Add(patience); time.Now().Before(limit); {
			if err := unix.Sendto(fd, request, 0, to); err != nil {
				continue
			}
			p := make([]byte, 200)
			if n, _, err := unix.Recvfrom(fd, p, 0); err == nil && n == 20+len(request) && p[20] == 0 &&
				string(p[24:n]) == string(request[4:]) {
				return nil
			}
		}
		return fmt.Errorf("the guest does not answer ping")
	})
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

// A guest that answers ARP, ping and UDP echo moves between two sites with
// bridges that are joined, there and back. A client at the first site goes on
// asking; the bridges learn by themselves where the guest is, before it has
// sent an answer from there.
func TestNetMoves(t *testing.T) {
	needKVM(t)
	a, b := newSites(t)
	mac, _ := net.ParseMAC("52:54:00:09:00:02")
	here := a.start("run", "n0", "--memory", "64M", "--net", "tap=gv0,bridge=br0,mac="+mac.String(), "--cmdline",
		"fill=8M dirty=2M rate=500 verify=1 tick=0.5 ip="+guestIP)
	here.out.awaitText(t, 0, "filled ")
	a.ping(t)
	client := a.echo(t)
	client.await(t, 5)
	at, to, from := a, b, "n0"
	for i := range count(2, 10) {
		name := fmt.Sprintf("n%d", i+1)
		there := to.start("receive", name, "--listen", siteAddress(to == b)+":0", "--net", fmt.Sprintf("tap=gv%d,bridge=br0", i+1))
		line := there.err.awaitText(t, 0, "listening on ")
		_, addr, _ := strings.Cut(there.err.snapshot()[line], "listening on ")
		before := client.await(t, 1)
		r, exit := at.migrate(from, "--to", strings.TrimSpace(addr))
		if exit != 0 || r.Status != "completed" {
			t.Fatalf("migration %d: exit %d, %+v", i, exit, r)
		}
		after := client.await(t, 5)
		there.out.awaitTick(t, 0, "the guest has announced itself", func(k tick) bool { return k.more["announced"] > 0 })
		lost := client.lost(before, after)
		t.Logf("migration %d: %d packets were not answered, downtime %.0f ms", i, lost, r.DowntimeMS)
		want, elsewhere := fmt.Sprintf("gv%d", i+1), "v0"
		if to == a {
			elsewhere = "v1"
		}
		if port := to.guestPort(t, mac); port != want {
			t.Errorf("migration %d: at the site that the guest is at, the bridge has it behind %q, not %q", i, port, want)
		}
		if port := at.guestPort(t, mac); port != elsewhere {
			t.Errorf("migration %d: at the other site the bridge has it behind %q, not %q", i, port, elsewhere)
		}
		to.ping(t)
		checkIRQs(t, there.out)
		at, to, from = to, at, name
	}
	client.end()
	if client.unexpected != 0 {
		t.Errorf("%d answers were not what was sent", client.unexpected)
	}
	at.must("stop", from)
}

func siteAddress(second bool) string {
	if second {
		return "10.9.0.11"
	}
	return siteIP
}
