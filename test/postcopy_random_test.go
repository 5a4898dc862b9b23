package test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
)

const randomOwned = 48 * mib / mempage.Size

// startRandom starts a guest that owns 48 MiB and rewrites them flat out.
func startRandom(h *host, name string) *proc {
	p := h.startDemo(name, 2, 64, 48, 48)
	awaitVerified(h.t, p.out, 0, randomOwned)
	return p
}

// backings are of the destinations, one after another.
var backings = []string{"anonymous", "memfd", "hugetlb"}

// early are the options of a migration that takes a second, and moves the guest after half
// of it.
var early = []string{"--postcopy=1", "--downtime-limit", "2ms", "--bandwidth-limit", "100M"}

// moment is one in the time that a migration takes here, or soon after.
func moment(r *rand.Rand) time.Duration { return time.Duration(r.Int64N(int64(time.Second))) }

// TestPostcopyCut: the network goes away at any moment and is there again a little later.
// The guest is on one side, all of its memory is, and no page is bad.
func TestPostcopyCut(t *testing.T) {
	needKVM(t)
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 0))
	h := newHost(t)
	reserveHugePages(t, 2*64/2+8)
	here := startRandom(h, "n0")
	stayed, moved, recovered := 0, 0, 0
	for i := range count(4, 100) {
		from, to := fmt.Sprintf("n%d", moved), fmt.Sprintf("n%d", moved+1)
		there, addr := h.receive(to, "--memory-backing", backings[i%3])
		w := newWire(t, addr)
		at := w.ln.Addr().String()
		m := h.start(append([]string{"migrate", from, "--json", "--to", at}, early...)...)
		time.Sleep(moment(r))
		w.cut()
		time.Sleep(moment(r) / 4)
		w.mend(t, at)
		exit := m.wait()
		res := decodeResult(t, m.out.tail(1), m.err.tail(5))
		t.Logf("cut %d: exit %d, %s", i, exit, res.Error)
		if exit == 0 {
			if here.wait() != 0 {
				t.Errorf("seed %d, cut %d: the source exits %d", seed, i, here.exit)
			}
			moved, here = moved+1, there
			if res.Postcopy != nil && res.Postcopy.Recoveries > 0 {
				recovered++
			}
			awaitVerified(t, there.out, 0, randomOwned)
			continue
		}
		stayed++
		if s := h.info(from).State; s != "running" || len(there.out.ticks()) > 0 {
			t.Fatalf("seed %d, cut %d: %s; the source is %s, the destination has printed %d ticks", seed, i, res.Error, s, len(there.out.ticks()))
		}
		awaitVerified(t, here.out, here.out.len(), randomOwned)
		there.kill(syscall.SIGKILL)
		<-there.done
	}
	t.Logf("%d stayed, %d moved, %d of them recovered", stayed, moved, recovered)
}

// TestPostcopyKilledAnyTime: either process is killed at any moment. Before the guest has
// moved it goes on at the source, or is gone with it; once all of its memory is there it is
// the destination's; in between it is lost, and runs on neither side.
func TestPostcopyKilledAnyTime(t *testing.T) {
	needKVM(t)
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 0))
	h := newHost(t)
	reserveHugePages(t, 2*64/2+8)
	outcomes := map[string]int{}
	var here *proc
	n := 0
	for i := range count(4, 200) {
		if here == nil {
			n++
			here = startRandom(h, fmt.Sprintf("n%d", n))
		}
		from, to := fmt.Sprintf("n%d", n), fmt.Sprintf("n%d", n+1)
		there, addr := h.receive(to, "--memory-backing", backings[i%3])
		m := h.start(append([]string{"migrate", from, "--json", "--to", addr}, early...)...)
		time.Sleep(moment(r))
		victim, name, other := there, "destination", from
		if i%2 == 0 {
			victim, name, other = here, "source", to
		}
		victim.kill(syscall.SIGKILL)
		<-victim.done
		state := func(vm string) (s info) { // "" if its process has ended
			out, _, exit := h.run("info", vm, "--json")
			if exit == 0 {
				_ = json.Unmarshal([]byte(out), &s)
			}
			return s
		}
		var now info
		what := ""
		for limit := time.Now().Add(patience); what == ""; time.Sleep(20 * time.Millisecond) {
			switch now = state(other); {
			case time.Now().After(limit):
				t.Fatalf("seed %d, kill %d: the %s was killed, the other side says %+v", seed, i, name, now)
			case now.MissingPages > 0 && strings.Contains(there.err.tail(5), "the guest stands still where it needs it"):
				what = "lost, its memory had not come"
			case strings.Contains(now.Migration.Error, "connection lost"):
				what = "lost, its memory had not gone"
			case now.State == "running" && now.MissingPages == 0, now.State == "receiving", now.State == "handoff-unknown":
				what = now.State
			case now.State == "":
				what = "ended, the guest had moved with all of its memory"
			}
		}
		outcomes[name+" killed: "+what]++
		t.Logf("kill %d, the %s: %s", i, name, what)
		switch {
		case what == "running" && name == "source": // it had moved
			awaitVerified(t, there.out, there.out.len(), randomOwned)
			here, n = there, n+1
		case what == "running": // it had not
			awaitVerified(t, here.out, here.out.len(), randomOwned)
		default:
			if len(there.out.ticks()) > 0 && what == "receiving" {
				t.Errorf("seed %d, kill %d: the destination waits for a guest, and one has run there", seed, i)
			}
			for _, p := range []*proc{here, there} {
				p.kill(syscall.SIGKILL)
				<-p.done
			}
			here, n = nil, n+1
		}
		if exit := m.wait(); exit == 0 && what != "running" && !strings.HasPrefix(what, "ended") {
			t.Errorf("seed %d, kill %d: the migration has succeeded, and the guest is %q", seed, i, what)
		}
	}
	for what, n := range outcomes {
		t.Logf("%d × %s", n, what)
	}
}
