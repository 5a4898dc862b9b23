package test

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
)

// largeMiB is the size of a large guest: $GOVMM_LARGE_MIB, or 8 GiB in the long runs
// and 2 GiB otherwise.
func largeMiB() int {
	if n, err := strconv.Atoi(os.Getenv("GOVMM_LARGE_MIB")); err == nil && n > 0 {
		return n
	}
	return count(2048, 8192)
}

// inUse is how much of a large guest is in use: 200 MiB of 8 GiB.
func inUse(mib int) int { return mib * 200 / 8192 }

// fewBytes checks that a migration sent hardly more than what it had to send.
func fewBytes(t *testing.T, r result, bytes uint64) {
	t.Helper()
	t.Logf("%d MiB to send of %d: %d bytes sent, %.1f%% more; %d pages sent, %d zero, %d holes, %d hinted of %d named, %d ms, of them %d waiting for hints",
		bytes/mib, r.RAMBytes/mib, r.BytesSent, (float64(r.BytesSent)/float64(bytes)-1)*100,
		r.PagesSent, r.PagesZero, r.PagesHole, r.PagesHinted, r.HintsReceived, r.TotalMS, r.HintWaitMS)
	if r.BytesSent > bytes*105/100 {
		t.Errorf("%d bytes sent", r.BytesSent)
	}
}

// TestLargeFreshGuest: of a large guest only the memory that it has touched is sent.
func TestLargeFreshGuest(t *testing.T) {
	needKVM(t)
	size := largeMiB()
	used := inUse(size)
	h := newHost(t)
	here := h.start("run", "l0", "--memory", fmt.Sprintf("%dM", size), "--cmdline", fmt.Sprintf("fill=%dM verify=1 tick=1", used))
	here.out.awaitText(t, 0, "filled ")
	there, addr := h.receive("l1")
	r, exit := h.migrate("l0", "--to", addr)
	if exit != 0 {
		t.Fatalf("%+v", r)
	}
	fewBytes(t, r, uint64(used)*mib)
	awaitVerified(t, there.out, 0, uint64(used)*mib/mempage.Size)
}

// terabyteMiB is the size of a guest that is far larger than the host: 1 TiB in the long
// runs. Where KVM shadows page tables, its own tables for that are 2.4 GiB at each end.
func terabyteMiB() int { return count(512<<10, 1<<20) }

// TestTerabyteFreshGuest: a guest whose memory is far larger than the host's boots and
// moves, and neither end has more memory than it has touched and a thousandth of what the guest
// has.
func TestTerabyteFreshGuest(t *testing.T) {
	needKVM(t)
	const used = 100
	size := terabyteMiB()
	h := newHost(t)
	here := h.start("run", "t0", "--overcommit", "--balloon", "--memory", fmt.Sprintf("%dM", size), "--cmdline", fmt.Sprintf("fill=%dM verify=1 tick=1", used))
	here.out.awaitText(t, 0, "filled ")
	most := peak(here.cmd.Process.Pid)
	there, addr := h.receive("t1", "--overcommit")
	r, exit := h.migrate("t0", "--to", addr)
	if exit != 0 {
		t.Fatalf("%+v", r)
	}
	fewBytes(t, r, used*mib)
	awaitVerified(t, there.out, 0, used*mib/mempage.Size)
	if r.PagesHole < uint64(size)*mib/mempage.Size*99/100 {
		t.Errorf("%d pages were holes", r.PagesHole)
	}
	here.wait()
	for who, bytes := range map[string]int{"source": <-most, "destination": rss(t, there.cmd.Process.Pid)} {
		t.Logf("the %s has %d MiB in memory", who, bytes/mib)
		if bytes > (used+used/2+size/1000)*mib {
			t.Errorf("the %s has %d MiB in memory, of a guest that has touched %d", who, bytes/mib, used)
		}
	}
}

// peak delivers the most memory that a process has had, in bytes, when it has ended. What
// the kernel says of a child afterwards, ru_maxrss, may be what its parent had.
func peak(pid int) <-chan int {
	most := make(chan int, 1)
	go func() {
		last := 0
		for {
			n, err := memoryOf(pid, "VmHWM:")
			if err != nil { // it has ended
				most <- last
				return
			}
			last = n
			time.Sleep(20 * time.Millisecond)
		}
	}()
	return most
}

// TestLargeFreedGuest: of a large guest that had filled most of its memory and freed
// nearly all of that, only what it kept is sent. Hints spare the rest.
func TestLargeFreedGuest(t *testing.T) {
	needKVM(t)
	size := largeMiB()
	used := inUse(size)
	h := newHost(t)
	here := h.start("run", "l0", "--memory", fmt.Sprintf("%dM", size), "--cmdline",
		fmt.Sprintf("pool=%dM keep=%dM verify=1 tick=1 reports=0", size*3/4, used))
	here.out.awaitText(t, 0, "is ready in")
	there, addr := h.receive("l1")
	r, exit := h.migrate("l0", "--to", addr, "--hints", "on", "--hint-wait", "5s")
	if exit != 0 {
		t.Fatalf("%+v", r)
	}
	// Blocks of 4 MiB are kept or freed as a whole. A guest that had no time to
	// name all that is free is sent the rest.
	bytes := uint64(used+3) &^ 3 * mib
	if r.HintWaitMS >= 5000 {
		bytes = uint64(size*3/4)*mib - r.inTime()*mempage.Size
	}
	if r.inTime() == 0 {
		t.Error("the guest named no free page in time")
	}
	fewBytes(t, r, bytes)
	first, at := there.out.awaitTick(t, 0, "any", func(tick) bool { return true })
	there.out.awaitTick(t, at, "the pool checked", func(k tick) bool { return k.more["checked"] >= first.more["checked"]+k.more["pool"] })
}

// BenchmarkLargeFreshGuest migrates a large guest and one of 512 MiB in turn. Both have
// touched the same amount. It reports the ratio of the times.
func BenchmarkLargeFreshGuest(b *testing.B) {
	needKVM(b)
	h := newHost(b)
	size := largeMiB()
	sizes := map[string]int{"small": 512, "large": size}
	for name, mib := range sizes {
		src := h.start("run", name+"0", "--memory", fmt.Sprintf("%dM", mib), "--cmdline", fmt.Sprintf("fill=%dM tick=1", inUse(size)))
		src.out.awaitText(b, 0, "filled ")
	}
	t := newTurns(b)
	for n := 0; b.Loop(); n++ {
		for _, name := range []string{"small", "large"} {
			_, addr := h.receive(fmt.Sprintf("%s%d", name, n+1))
			r, exit := h.migrate(fmt.Sprintf("%s%d", name, n), "--to", addr)
			if exit != 0 {
				b.Fatalf("%+v", r)
			}
			t.add(name, time.Duration(r.TotalMS)*time.Millisecond)
		}
	}
	t.ratio("small", "large", "large-to-small")
	t.report(inUse(size))
}
