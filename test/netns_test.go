package test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// site is a host of a test network: a network namespace with a bridge, to which
// guests' taps and a cable to the other site belong.
type site struct {
	*host
	ns     string
	bridge string
	ip     string // of the bridge
}

// ip runs ip(8), which has to succeed.
func ip(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// newSites makes two sites whose bridges are joined by a veth pair. Their
// addresses are 10.9.0.1 and 10.9.0.3; both vanish with the test.
func newSites(t testing.TB) (a, b *site) {
	t.Helper()
	needRoot(t)
	id := os.Getpid() % 100000
	sites := make([]*site, 2)
	for i := range sites {
		s := &site{host: newHost(t), ns: fmt.Sprintf("gv%d-%d", id, i), bridge: "br0", ip: fmt.Sprintf("10.9.0.%d", 1+2*i)}
		sites[i] = s
		ip(t, "netns", "add", s.ns)
		t.Cleanup(func() { ip(t, "netns", "del", s.ns) })
		s.via = []string{"ip", "netns", "exec", s.ns}
		s.inside("link", "set", "lo", "up")
		s.inside("link", "add", s.bridge, "type", "bridge")
		s.inside("addr", "add", s.ip+"/24", "dev", s.bridge)
		s.inside("link", "set", s.bridge, "up")
	}
	a, b = sites[0], sites[1]
	ip(t, "link", "add", "cable", "netns", a.ns, "type", "veth", "peer", "name", "cable", "netns", b.ns)
	for _, s := range sites {
		s.inside("link", "set", "cable", "master", s.bridge)
		s.inside("link", "set", "cable", "up")
	}
	return a, b
}

// inside runs ip(8) at the site.
func (s *site) inside(args ...string) {
	s.t.Helper()
	ip(s.t, append([]string{"-n", s.ns}, args...)...)
}
