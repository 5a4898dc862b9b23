package test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
)

// mixer is a guest that goes from process to process in every way there is.
type mixer struct {
	t      *testing.T
	at     *site
	dir    string
	image  string
	random *rand.Rand
	proc   *proc
	client *echoes
	n      int // of its process
	owned  uint64
	huge   bool // it is in huge pages
}

func (m *mixer) name() string { return fmt.Sprintf("m%d", m.n) }

// devices are what the next process gives it of this host.
func (m *mixer) devices() []string {
	return []string{"--disk", m.image, "--net", fmt.Sprintf("tap=gt%d,bridge=br0", m.n+1)}
}

func (m *mixer) backing(of ...string) string { return of[m.random.IntN(len(of))] }

// check waits until the guest in its new process has checked all of its memory, what it took
// back of what it had hinted, and its disk, and answers on its network.
func (m *mixer) check(from int) {
	m.t.Helper()
	first, next := m.proc.out.awaitTick(m.t, from, "any", func(tick) bool { return true })
	m.proc.out.awaitTick(m.t, next, "all of memory and disk checked", func(k tick) bool {
		if k.more["dbad"] != 0 {
			m.t.Fatalf("the disk: %+v", k)
		}
		return k.verified >= first.verified+m.owned && k.more["checked"] >= first.more["checked"]+first.more["pool"] && k.more["dreads"] > first.more["dreads"]+100
	})
	for _, line := range m.proc.out.snapshot() {
		if strings.Contains(line, "bad page") || strings.Contains(line, "bad notes") {
			m.t.Error(line)
		}
	}
	m.client.await(m.t, 3)
}

// arrived says that the guest is in another process.
func (m *mixer) arrived(there *proc) {
	m.t.Helper()
	if m.proc.wait() != 0 {
		m.t.Errorf("%s: its process exits %d", m.name(), m.proc.exit)
	}
	m.n, m.proc = m.n+1, there
	m.check(0)
}

// migrate moves it to a receiver.
func (m *mixer) migrate(backing string, more ...string) result {
	m.t.Helper()
	there := m.at.start(append([]string{"receive", fmt.Sprintf("m%d", m.n+1), "--listen", m.at.ip + ":0", "--insecure", "--memory-backing", backing}, m.devices()...)...)
	m.huge = backing == "hugetlb"
	line := there.err.awaitText(m.t, 0, "listening on ")
	_, addr, _ := strings.Cut(there.err.snapshot()[line], "listening on ")
	r, exit := m.at.migrate(append([]string{m.name(), "--to", strings.TrimSpace(addr)}, more...)...)
	if exit != 0 || r.Status != "completed" {
		m.t.Fatalf("%s: migration %v: exit %d, %+v", m.name(), more, exit, r)
	}
	m.arrived(there)
	return r
}

// ways of a mixer, each of which returns what was special.
var mixes = map[string]func(m *mixer) string{
	"precopy": func(m *mixer) string {
		backing := m.backing("anonymous", "memfd", "hugetlb")
		m.migrate(backing, "--downtime-limit", "3s", "--channels", fmt.Sprint(1+m.random.IntN(4)))
		return backing
	},
	"postcopy": func(m *mixer) string {
		backing := m.backing("anonymous", "memfd", "hugetlb")
		r := m.migrate(backing, "--downtime-limit", "5ms", "--bandwidth-limit", "100M", "--postcopy=1")
		if r.Postcopy == nil {
			return backing + ", all came before"
		}
		return fmt.Sprintf("%s, %d pages later", backing, r.Postcopy.Pages)
	},
	"snapshot": func(m *mixer) string {
		at := filepath.Join(m.dir, m.name())
		m.at.mustSnapshot(m.name(), "--to", at, "--stop", "--compress", m.backing("none", "none", "zstd"))
		how := []string{"--restore", "auto"}
		if m.huge || m.random.IntN(2) == 0 { // a pool of huge pages is not taken unasked
			how = []string{"--restore", "eager", "--memory-backing", m.backing("anonymous", "memfd", "hugetlb")}
		}
		m.huge = slices.Contains(how, "hugetlb")
		next := m.at.start(append(append([]string{"run", fmt.Sprintf("m%d", m.n+1), "--from", at}, how...), m.devices()...)...)
		m.arrived(next)
		if err := os.RemoveAll(at); err != nil { // what is mapped stays
			m.t.Error(err)
		}
		return strings.Join(how, " ")
	},
	"upgrade": func(m *mixer) string {
		binary := govmm
		if m.random.IntN(2) == 0 {
			binary = nextBuild(m.t)
		}
		from := m.proc.out.len()
		r := m.at.mustUpgrade(m.name(), "--binary", binary)
		m.check(from + 1)
		return fmt.Sprintf("memory %s", r.Memory)
	},
}

// TestMixed: a guest with two vCPUs that rewrites memory flat out, hints memory and takes
// some back while that is under way, writes its disk and answers on its network goes on by
// migrations, postcopies, snapshots that are restored, and upgrades, in an order of chance, in
// memory of every kind: no page is bad, on the disk neither.
func TestMixed(t *testing.T) {
	needKVM(t)
	const memory, fill = 160, 48
	reserveHugePages(t, 2*memory/2+8)
	seed := uint64(time.Now().UnixNano())
	a, _ := newSites(t)
	m := &mixer{t: t, at: a, dir: t.TempDir(), image: newImage(t, 8*mib), random: rand.New(rand.NewPCG(seed, 0)), owned: fill * mib / mempage.Size}
	var order []string
	for range count(1, 50) {
		order = append(order, "precopy", "postcopy", "snapshot", "upgrade")
	}
	m.random.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	t.Logf("seed %d: %v", seed, order)
	first := m.backing("anonymous", "memfd", "hugetlb")
	m.huge = first == "hugetlb"
	m.proc = a.start("run", "m0", "--cpus", "2", "--memory", fmt.Sprintf("%dM", memory), "--memory-backing", first,
		"--disk", m.image, "--net", "tap=gt0,bridge=br0", "--cmdline",
		fmt.Sprintf("fill=%dM dirty=16M rate=0 zeros=5 verify=1 tick=0.5 pool=32M keep=8M hintrace reports=0 disk=2M drate=0 ip=%s", fill, guestIP))
	m.proc.out.awaitText(t, 0, "is ready in")
	m.client = a.echo(t)
	m.check(0)
	for i, how := range order {
		began := time.Now()
		note := mixes[how](m)
		if t.Failed() {
			t.Fatalf("move %d, %s (%s)", i, how, note)
		}
		t.Logf("move %d: %s, %s; checked after %.1f s", i, how, note, time.Since(began).Seconds())
	}
	a.must("stop", "--force", m.name())
	m.proc.wait()
	m.client.end()
	if m.client.unexpected != 0 {
		t.Errorf("%d answers were not what was sent", m.client.unexpected)
	}
	checkImage(t, m.image, 2*mib/mempage.Size)
}
