package test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/vmm/api"
)

// TestHostileGuests runs guests that keep to no rule (guest/src/hostile.c), with every
// kind of device: whatever they do to registers and rings, the guest can be paused,
// asked for, moved or kept, and stopped, and the VMM neither breaks nor grows.
func TestHostileGuests(t *testing.T) {
	needKVM(t)
	here, _ := newSites(t)
	figures := &hostileFigures{ends: map[string]int{}}
	t.Cleanup(func() { figures.report(t) })
	first := uint64(0)
	if s := os.Getenv("GOVMM_HOSTILE_SEED"); s != "" { // one that failed, again
		var err error
		if first, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("seeds", func(t *testing.T) {
		for i := range uint64(count(30, 1000)) {
			seed := first + i
			t.Run(fmt.Sprint(seed), func(t *testing.T) {
				t.Parallel()
				r := &hostileRun{host: newHost(t), t: t, seed: seed, r: rand.New(rand.NewPCG(seed, 14)), figures: figures}
				r.via = here.via
				r.run()
			})
		}
	})
}

// hostileRun is a run of one seed.
type hostileRun struct {
	*host
	t       *testing.T
	seed    uint64
	r       *rand.Rand
	figures *hostileFigures

	vm     *proc
	client *api.Client
	at     int // how often the guest has moved
	seen   int // lines of steps
}

// hostileFigures is what all runs have shown.
type hostileFigures struct {
	mu            sync.Mutex // guards all below
	pauses, stops []time.Duration
	anonymous     []int // KiB of the VMM's own memory
	lines         []int // on stderr
	ends          map[string]int
}

func (f *hostileFigures) ended(how string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ends[how]++
}

func (f *hostileFigures) report(t *testing.T) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.pauses) == 0 || len(f.stops) == 0 || len(f.anonymous) == 0 {
		t.Error("no run got as far as a pause and a stop")
		return
	}
	t.Logf("%d pauses, the longest %v; %d stops, the longest %v; at most %d KiB of own memory; at most %d lines logged; ends: %v",
		len(f.pauses), slices.Max(f.pauses), len(f.stops), slices.Max(f.stops), slices.Max(f.anonymous), slices.Max(f.lines), f.ends)
}

const hostileDisk = 4 << 20

func (h *hostileRun) run() {
	disk := filepath.Join(h.dir, "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Truncate(disk, hostileDisk); err != nil {
		h.t.Fatal(err)
	}
	args := append([]string{"run", h.name(), "--kernel", "../guest/hostile.elf", "--cmdline", fmt.Sprintf("seed=%d", h.seed),
		"--memory", []string{"64M", "96M"}[h.r.IntN(2)], "--cpus", fmt.Sprint(1 + h.r.IntN(2)),
		"--sandbox", "on", "--console", []string{"null", "unix:" + h.dir + "/console", "file:" + h.dir + "/out,max=1M"}[h.r.IntN(3)]}, h.devices(true)...)
	h.began(h.start(args...))
	h.answers()
	h.vm.out.awaitText(h.t, 0, "hostile guest: seed")
	for range 2 + h.r.IntN(3) {
		h.provoke()
		if !h.pauses() {
			return
		}
	}
	if h.r.IntN(4) == 0 && !h.moves() {
		return
	}
	h.stops()
	if info, err := os.Stat(disk); err != nil || info.Size() != hostileDisk {
		h.t.Errorf("the disk's file: %v, %v", info, err)
	}
}

func (h *hostileRun) name() string { return fmt.Sprintf("h%d", h.at) }

// devices are the flags of every kind of device, for a source or a destination.
func (h *hostileRun) devices(source bool) []string {
	cid, queues := "", ""
	if source {
		cid = ",cid=3"
		if h.seed%2 == 0 {
			queues = ",queues=2"
		}
	}
	tap := fmt.Sprintf("h%d.%d", h.seed, h.at)
	return []string{"--disk", "path=" + h.dir + "/disk" + queues, "--net", "tap=" + tap + ",bridge=br0", "--vsock", "path=" + h.vsock() + cid}
}

func (h *hostileRun) vsock() string { return fmt.Sprintf("%s/v%d", h.dir, h.at) }

// began is called when the guest is in a process.
func (h *hostileRun) began(p *proc) {
	h.vm, h.seen = p, 0
	p.mayFault = true
	h.client = api.Open(filepath.Join(h.dir, "govmm", h.name()+".sock"))
	h.client.Timeout = patience // how long a pause may take is govmm's to say
}

// provoke is what a host does to its guest's devices.
func (h *hostileRun) provoke() {
	ctx := context.Background()
	for range h.r.IntN(4) {
		switch h.r.IntN(4) {
		case 0:
			_, _ = h.client.SetBalloon(ctx, uint64(h.r.IntN(64))<<20) // refused by a guest without memory to give
		case 1:
			_, _ = h.client.Balloon(ctx)
		case 2:
			h.talk(h.vsock(), fmt.Sprintf("CONNECT %d\n%s", h.r.IntN(8), strings.Repeat("x", h.r.IntN(3000))))
		case 3:
			h.talk(h.dir+"/console", strings.Repeat("y", h.r.IntN(3000)))
		}
	}
	h.works()
}

// works lets the guest make some hundreds of steps. One that has stopped its own vCPUs
// makes none, and need not.
func (h *hostileRun) works() {
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if n := h.steps(); n > h.seen {
			h.seen = n
			return
		}
	}
}

// steps counts the lines in which the guest says how far it is.
func (h *hostileRun) steps() (n int) {
	for _, s := range h.vm.out.snapshot() {
		if strings.Contains(s, "hostile guest: seed") {
			n++
		}
	}
	return n
}

// answers takes the guest's connections to some ports of the host, and sends back what
// comes.
func (h *hostileRun) answers() {
	for port := range 4 {
		ln, err := net.Listen("unix", fmt.Sprintf("%s_%d", h.vsock(), port))
		if err != nil {
			h.t.Fatal(err)
		}
		h.t.Cleanup(func() { ln.Close() })
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go func() {
					_, _ = io.Copy(c, c) // until the guest, or its process, ends it
					_ = c.Close()
				}()
			}
		}()
	}
}

// talk connects, if somebody listens, and leaves a little later.
func (h *hostileRun) talk(path, words string) {
	c, err := net.Dial("unix", path)
	if err != nil {
		return
	}
	_ = c.SetDeadline(time.Now().Add(time.Second)) // nobody may take it
	_, _ = c.Write([]byte(words))
	time.AfterFunc(time.Duration(h.r.IntN(200))*time.Millisecond, func() { _ = c.Close() })
}

// pauses pauses the guest and lets it go on. It returns false if there is none any
// more.
func (h *hostileRun) pauses() bool {
	begin := time.Now()
	info, err := h.client.Pause(context.Background())
	took := time.Since(begin)
	if err != nil {
		return h.gone("pause", err)
	}
	if info.State != "paused" {
		h.t.Errorf("paused, it is %s", info.State)
	}
	h.figures.mu.Lock()
	h.figures.pauses = append(h.figures.pauses, took)
	h.figures.mu.Unlock()
	if _, err := h.client.Resume(context.Background(), false); err != nil {
		return h.gone("resume", err)
	}
	return true
}

// moves moves the guest, or fails to with one line: then it goes on where it is.
func (h *hostileRun) moves() bool {
	old := h.at
	h.at++
	there, addr := h.receive(h.name(), append(h.devices(false), "--sandbox", "on")...)
	result, err := h.client.Migrate(context.Background(), api.MigrateRequest{To: addr, DowntimeLimit: api.Duration(time.Minute), Timeout: api.Duration(patience)}, nil)
	if err != nil {
		return h.gone("migrate", err)
	}
	h.figures.ended("migration " + result.Status)
	if result.Status == "completed" {
		if exit := h.vm.wait(); exit != 0 {
			h.t.Errorf("the source ended with %d", exit)
		}
		h.sound(h.vm)
		h.began(there)
	} else {
		if result.Error == "" || strings.Contains(result.Error, "\n") {
			h.t.Errorf("migration %s: %q", result.Status, result.Error)
		}
		h.t.Logf("migration %s: %s; the destination: %s", result.Status, result.Error, there.err.tail(2))
		there.kill(syscall.SIGTERM)
		there.wait()
		h.sound(there)
		h.at = old
	}
	return h.pauses()
}

// stops ends the guest, one way or the other.
func (h *hostileRun) stops() {
	h.measure()
	begin := time.Now()
	if h.r.IntN(4) > 0 {
		if _, err := h.client.Stop(context.Background()); err != nil {
			h.gone("stop", err)
			return
		}
	} else {
		h.vm.kill(syscall.SIGTERM)
		h.asked()
		h.vm.kill(syscall.SIGTERM)
	}
	exit := h.vm.wait()
	h.figures.mu.Lock()
	h.figures.stops = append(h.figures.stops, time.Since(begin))
	h.figures.mu.Unlock()
	if exit != 0 && !h.crashed() {
		h.t.Errorf("exit status %d", exit)
	}
	h.figures.ended("stopped")
	h.sound(h.vm)
}

// asked waits until the first signal was taken: two at once may be one.
func (h *hostileRun) asked() {
	h.t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		select {
		case <-h.vm.done:
			return
		default:
		}
		for _, s := range h.vm.err.snapshot() {
			if strings.Contains(s, "a second signal ends it at once") {
				return
			}
		}
	}
	h.t.Fatal("the process takes no signal")
}

// gone reports what follows from a call that failed: nothing, if the guest has ended
// itself. It returns false.
func (h *hostileRun) gone(what string, err error) bool {
	h.t.Helper()
	if !errors.Is(err, api.ErrNotRunning) && !errors.Is(err, api.ErrLost) && !strings.Contains(err.Error(), "ended") && !strings.Contains(err.Error(), "has stopped") {
		h.vm.kill(syscall.SIGQUIT) // the stacks
		h.vm.wait()
		h.t.Fatalf("%s: %v", what, err)
	}
	switch exit := h.vm.wait(); {
	case exit == 0 && strings.Contains(h.vm.err.tail(1), "powered off"):
		h.figures.ended("powered off")
	case h.crashed():
		h.figures.ended("crashed")
	default:
		h.t.Errorf("%s: %v; the process has ended with %d", what, err, exit)
	}
	h.sound(h.vm)
	return false
}

// crashed says whether the process ended with the line for a guest that KVM cannot
// run on.
func (h *hostileRun) crashed() bool {
	return h.vm.exit == 1 && strings.Contains(h.vm.err.tail(1), "the guest crashed: ")
}

// broken is what no process may say.
var broken = regexp.MustCompile(`^panic:|^fatal error:|^goroutine \d|^SIGSEGV|DATA RACE|hung`)

// sound checks what a process has said.
func (h *hostileRun) sound(p *proc) {
	h.t.Helper()
	said := p.err.snapshot()
	if len(said) > hostileLines {
		h.t.Errorf("the process said %d lines, such as %q", len(said), said[len(said)-1])
	}
	if at := slices.IndexFunc(said, broken.MatchString); at >= 0 {
		h.t.Errorf("the process said %q", said[at])
	}
}

// hostileLines is the most that a VMM may log: each kind of line comes once in 10 s.
const hostileLines = 1000

// hostileMemory is the most memory of its own that a VMM may have, in KiB.
const hostileMemory = 200 << 10

var anonymous = regexp.MustCompile(`(?m)^RssAnon:\s+(\d+) kB`)

// measure checks how much memory of its own the VMM has: the guest's is not among it.
func (h *hostileRun) measure() {
	h.t.Helper()
	info, err := h.client.Info(context.Background())
	if err != nil {
		return // it has ended, which the stop will see
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", info.PID))
	if err != nil {
		return
	}
	m := anonymous.FindSubmatch(status)
	if m == nil {
		h.t.Fatalf("no RssAnon in %s", status)
	}
	kib, _ := strconv.Atoi(string(m[1]))
	if kib > hostileMemory {
		h.t.Errorf("the VMM has %d KiB of its own", kib)
	}
	h.figures.mu.Lock()
	defer h.figures.mu.Unlock()
	h.figures.anonymous = append(h.figures.anonymous, kib)
	h.figures.lines = append(h.figures.lines, h.vm.err.len())
}
