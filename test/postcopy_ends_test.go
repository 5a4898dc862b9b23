package test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/govmm/govmm/mempage"
)

// TestPostcopyGuestEnds: a guest that powers off, or resets itself, while its memory follows
// it needs no more of that. The source is told and ends; after a reset the guest starts anew
// where it is, and its VM can be moved on. So it is if the network is away at that moment.
func TestPostcopyGuestEnds(t *testing.T) {
	needKVM(t)
	for _, c := range []struct {
		word string
		cut  bool
	}{{"poweroff", false}, {"reboot", false}, {"reboot", true}} {
		t.Run(fmt.Sprintf("%s cut=%v", c.word, c.cut), func(t *testing.T) {
			h := newHost(t)
			here := h.start("run", "e0", "--cpus", "2", "--memory", "128M", "--cmdline", "fill=96M dirty=96M rate=3000 verify=1 tick=0.5")
			here.out.awaitText(t, 0, "filled ")
			there, addr := h.receive("e1")
			w := newWire(t, addr)
			at := w.ln.Addr().String()
			m := h.start("migrate", "e0", "--json", "--to", at, "--postcopy=1", "--downtime-limit", "1ms", "--bandwidth-limit", "30M")
			h.awaitPostcopy("e0")
			if c.cut {
				w.cut()
				h.awaitInfo("e0", "a lost connection", func(i info) bool { return strings.Contains(i.Migration.Error, "connection lost") })
				// The guest may stand still for a page, and cannot reset itself: its user does it.
				h.must("stop", "--force", "e1")
			} else {
				t.Logf("%d pages are missing", h.info("e1").MissingPages)
				there.typeLine(c.word)
			}
			if c.word == "reboot" && !c.cut {
				there.out.awaitText(t, 0, "filled ")
			} else if exit := there.wait(); exit != 0 {
				t.Errorf("the destination exits %d", exit)
			}
			if c.cut {
				h.must("stop", "--force", "e0")
				if m.wait() == 0 {
					t.Error("a migration whose destination was stopped is completed")
				}
				here.wait()
				return
			}
			if exit := m.wait(); exit != 0 {
				t.Fatalf("the migration exits %d: %s", exit, m.err.tail(3))
			}
			if r := decodeResult(t, m.out.tail(1), m.err.tail(5)); r.Status != "completed" || r.Postcopy == nil {
				t.Errorf("%+v", r)
			}
			if exit := here.wait(); exit != 0 {
				t.Errorf("the source exits %d", exit)
			}
			if c.word == "reboot" {
				next, addr := h.receive("e2")
				if r, exit := h.migrate("e1", "--to", addr, "--downtime-limit", "3s"); exit != 0 {
					t.Fatalf("after the reset: exit %d, %+v", exit, r)
				}
				awaitVerified(t, next.out, 0, 96*mib/mempage.Size)
			}
		})
	}
}
