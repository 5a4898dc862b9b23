package test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/govmm/govmm/mempage"
)

// rss returns the resident memory of a process without files that are mapped, in bytes.
func rss(t testing.TB, pid int) int {
	t.Helper()
	n, err := memoryOf(pid, "RssAnon:")
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// memoryOf returns a figure of /proc/PID/status, in bytes.
func memoryOf(pid int, what string) (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(string(text), what)
	fields := strings.Fields(after)
	if len(fields) == 0 {
		return 0, fmt.Errorf("process %d has no %s", pid, what)
	}
	kib, err := strconv.Atoi(fields[0])
	return kib << 10, err
}

// awaitBallooned waits until the guest's balloon holds that much.
func awaitBallooned(t testing.TB, l *lines, from, bytes int) (tick, int) {
	t.Helper()
	return l.awaitTick(t, from, fmt.Sprintf("%d bytes in the balloon", bytes), func(k tick) bool {
		if k.more["stale"] != 0 {
			t.Errorf("pages that the host had taken came back with their old content: %+v", k)
		}
		return k.more["ballooned"] == uint64(bytes/mempage.Size)
	})
}

// TestBalloonMoves: the balloon takes 64 MiB from a full pool, and the VMM's memory
// shrinks by as much. Given back, the pages are used again. Then the balloon is
// inflated during a migration, after some of its pages were sent, and deflated at the
// destination: the pages must read as zero there, which the guest checks.
func TestBalloonMoves(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	const size = 64 * mib
	here := h.start("run", "b0", "--memory", "256M", "--cmdline",
		"fill=8M dirty=2M rate=50 verify=1 tick=0.5 pool=80M keep=80M reports=0")
	here.out.awaitText(t, 0, "is ready in")
	pid := here.cmd.Process.Pid
	full := rss(t, pid)
	h.must("balloon", "b0", "--target", "64M")
	_, at := awaitBallooned(t, here.out, here.out.len(), size)
	if less := full - rss(t, pid); less < size*9/10 || less > size*11/10 {
		t.Errorf("with 64 MiB in the balloon the VMM has %d KiB less", less>>10)
	}
	h.must("balloon", "b0", "--target", "0")
	_, at = awaitBallooned(t, here.out, at, 0)
	here.out.awaitTick(t, at, "the pool full again", func(k tick) bool { return k.more["pool"] == 80*mib/mempage.Size })
	if less := full - rss(t, pid); less > size/10 {
		t.Errorf("with nothing in the balloon the VMM has %d KiB less than before", less>>10)
	}

	there, addr := h.receive("b1")
	// The guest's 88 MiB take 44 s at 2 MiB/s. The balloon grows when 10 MiB of
	// them have been sent; what it leaves takes some seconds more.
	mig := h.start("migrate", "b0", "--to", addr, "--bandwidth-limit", "2M", "--downtime-limit", "1s", "--json")
	h.awaitMigrating("b0", 10*mib)
	h.must("balloon", "b0", "--target", "64M")
	awaitBallooned(t, here.out, here.out.len(), size) // at the source still
	if mig.wait() != 0 {
		t.Fatalf("migrate exits %d", mig.exit)
	}
	_, at = awaitBallooned(t, there.out, 0, size)
	h.must("balloon", "b1", "--target", "0")
	_, at = awaitBallooned(t, there.out, at, 0)
	k, at := there.out.awaitTick(t, at, "the pool full again", func(k tick) bool { return k.more["pool"] == 80*mib/mempage.Size })
	if k.more["zeroed"] != 2*size/mempage.Size || k.more["stale"] != 0 {
		t.Errorf("of %d pages that were in the balloon %d came back as zeros, %d with their old content",
			2*size/mempage.Size, k.more["zeroed"], k.more["stale"])
	}
	awaitVerified(t, there.out, at, 8*mib/mempage.Size)
}
