// Package test has the end-to-end tests: the built govmm, real processes, real
// KVM, real TCP.
package test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
)

// govmm is the path of the binary under test, built once.
var govmm string

func TestMain(m *testing.M) {
	if role := os.Getenv(rawRole); role != "" {
		if err := rawMain(role); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if role := os.Getenv(strangerRole); role != "" {
		if err := strangerMain(role); err != nil {
			_, _ = fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if govmm = os.Getenv("GOVMM_BINARY"); govmm != "" { // built elsewhere, for a machine that is slow at it
		os.Exit(func() int { defer removeBooted(); return m.Run() }())
	}
	os.Exit(func() int {
		defer removeBooted()
		dir, err := os.MkdirTemp("", "govmm-e2e-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		govmm = filepath.Join(dir, "govmm")
		build := exec.Command("go", "build", "-o", govmm, "../cmd/govmm")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build govmm: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

var (
	needKVM  = testenv.NeedKVM
	full     = testenv.Full
	emulated = testenv.Emulated
	patience = testenv.Patience
)

// count returns n in the long runs and short otherwise.
func count(short, n int) int {
	if full() {
		return n
	}
	return short
}

// host is a place where VMs have names: a runtime directory of its own.
type host struct {
	t   testing.TB
	dir string
	via []string // a command that runs others, in a network namespace say
}

func newHost(t testing.TB) *host {
	dir, err := os.MkdirTemp("", "gv") // a short path: it holds sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return &host{t: t, dir: dir}
}

// proc is a govmm process.
type proc struct {
	t    testing.TB
	cmd  *exec.Cmd
	out  *lines // stdout: the guest's serial port
	err  *lines // stderr: govmm's words
	in   io.WriteCloser
	done chan struct{}
	exit int // valid after done
	// mayFault says that the guest may make a triple fault, which resets it.
	mayFault bool

	reportAt int64 // where in guest memory report found it
	memoryOf int   // the process that has guest memory; 0: this one
}

func (h *host) command(args ...string) *exec.Cmd {
	argv := append(append(append([]string{}, h.via...), govmm), args...)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+h.dir, "XDG_STATE_HOME="+h.dir, "GOTRACEBACK=all")
	return cmd
}

// start runs govmm until the test ends.
func (h *host) start(args ...string) *proc {
	h.t.Helper()
	p := &proc{t: h.t, cmd: h.command(args...), out: newLines(), err: newLines(), done: make(chan struct{})}
	stdout, err := p.cmd.StdoutPipe()
	if err == nil {
		p.in, err = p.cmd.StdinPipe()
	}
	if err != nil {
		h.t.Fatal(err)
	}
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	var readers sync.WaitGroup
	readers.Go(func() { p.out.from(stdout) })
	readers.Go(func() { p.err.from(stderr) })
	go func() {
		readers.Wait()
		_ = p.cmd.Wait() // the exit status says it
		p.exit = p.cmd.ProcessState.ExitCode()
		close(p.done)
	}()
	h.t.Cleanup(func() {
		p.kill(syscall.SIGKILL)
		<-p.done
		if !p.mayFault && strings.Contains(p.err.tail(1000), "triple fault") {
			h.t.Error("the guest has made a triple fault")
		}
		if h.t.Failed() {
			h.t.Logf("--- govmm %s: exit %d\nstdout:\n%s\nstderr:\n%s", strings.Join(args, " "), p.exit, p.out.tail(25), p.err.tail(40))
		}
	})
	return p
}

func (p *proc) kill(sig syscall.Signal) {
	select {
	case <-p.done:
	default:
		_ = p.cmd.Process.Signal(sig)
	}
}

// wait returns the exit status.
func (p *proc) wait() int {
	p.t.Helper()
	select {
	case <-p.done:
		return p.exit
	case <-time.After(patience):
		p.t.Fatalf("govmm %s does not end", strings.Join(p.cmd.Args[1:], " "))
		return -1
	}
}

// run runs govmm to its end.
func (h *host) run(args ...string) (stdout, stderr string, exit int) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*patience)
	defer cancel()
	cmd := h.command(args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	err := cmd.Wait()
	if ee := (*exec.ExitError)(nil); err != nil && !errors.As(err, &ee) {
		h.t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// must runs govmm, which has to succeed, and returns its stdout.
func (h *host) must(args ...string) string {
	h.t.Helper()
	out, errs, exit := h.run(args...)
	if exit != 0 {
		h.t.Fatalf("govmm %s: exit %d\n%s%s", strings.Join(args, " "), exit, out, errs)
	}
	return out
}

// lines is what a process has said so far.
type lines struct {
	mu   sync.Mutex // guards all below
	all  []string
	more chan struct{} // closed when something is added
	eof  bool
}

func newLines() *lines { return &lines{more: make(chan struct{})} }

func (l *lines) from(r io.Reader) {
	br := bufio.NewReader(r)
	for {
		s, err := br.ReadString('\n')
		l.mu.Lock()
		if s != "" {
			l.all = append(l.all, strings.TrimRight(s, "\r\n"))
		}
		l.eof = err != nil
		close(l.more)
		l.more = make(chan struct{})
		l.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (l *lines) tail(n int) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.all[max(0, len(l.all)-n):], "\n")
}

func (l *lines) len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.all)
}

func (l *lines) snapshot() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string{}, l.all...)
}

// await returns the index of the first line at or after from for which ok is
// true.
func (l *lines) await(t testing.TB, from int, what string, ok func(string) bool) int {
	t.Helper()
	deadline := time.After(patience)
	for {
		l.mu.Lock()
		for ; from < len(l.all); from++ {
			if ok(l.all[from]) {
				l.mu.Unlock()
				return from
			}
		}
		more, eof := l.more, l.eof
		l.mu.Unlock()
		if eof {
			t.Fatalf("ended without %s; last lines:\n%s", what, l.tail(10))
		}
		select {
		case <-more:
		case <-deadline:
			t.Fatalf("no %s within %v; last lines:\n%s", what, patience, l.tail(10))
		}
	}
}

func (l *lines) awaitText(t testing.TB, from int, text string) int {
	t.Helper()
	return l.await(t, from, strconv.Quote(text), func(s string) bool { return strings.Contains(s, text) })
}

// tick is one line of the demo guest.
type tick struct {
	n                     int
	up                    float64
	writes, verified, bad uint64
	gap                   float64 // milliseconds
	// more is what the guest's drivers count, by name: dwrites, ballooned and so
	// on; empty without devices.
	more map[string]uint64
}

var tickLine = regexp.MustCompile(`^tick (\d+) up=([\d.]+) writes=(\d+) verified=(\d+) bad=(\d+) gap=([\d.]+)((?: [a-z]+=\d+)*)$`)

func parseTick(s string) (k tick, ok bool) {
	m := tickLine.FindStringSubmatch(s)
	if m == nil {
		return k, false
	}
	k.n, _ = strconv.Atoi(m[1])
	k.up, _ = strconv.ParseFloat(m[2], 64)
	k.writes, _ = strconv.ParseUint(m[3], 10, 64)
	k.verified, _ = strconv.ParseUint(m[4], 10, 64)
	k.bad, _ = strconv.ParseUint(m[5], 10, 64)
	k.gap, _ = strconv.ParseFloat(m[6], 64)
	k.more = make(map[string]uint64)
	for _, f := range strings.Fields(m[7]) {
		key, value, _ := strings.Cut(f, "=")
		k.more[key], _ = strconv.ParseUint(value, 10, 64)
	}
	return k, true
}

// awaitTick returns the first tick at or after line from for which ok is true,
// and the line after it. Every tick that is passed must have bad=0.
func (l *lines) awaitTick(t testing.TB, from int, what string, ok func(tick) bool) (tick, int) {
	t.Helper()
	var got tick
	at := l.await(t, from, "tick: "+what, func(s string) bool {
		k, is := parseTick(s)
		if !is {
			return false
		}
		if k.bad != 0 {
			t.Errorf("lost a page: %s", s)
		}
		got = k
		return ok(k)
	})
	return got, at + 1
}

// ticks are all that were printed.
func (l *lines) ticks() (all []tick) {
	for _, s := range l.snapshot() {
		if k, ok := parseTick(s); ok {
			all = append(all, k)
		}
	}
	return all
}

// result is what migrate --json prints.
type result struct {
	Status       string             `json:"status"`
	Error        string             `json:"error"`
	TotalMS      int64              `json:"total_ms"`
	SetupMS      int64              `json:"setup_ms"`
	DowntimeMS   float64            `json:"downtime_ms"`
	Downtime     map[string]float64 `json:"downtime"`
	DowntimeNote string             `json:"downtime_note"`
	BytesSent    uint64             `json:"bytes_sent"`
	RAMBytes     uint64             `json:"ram_bytes"`
	PagesSent    uint64             `json:"pages_sent"`
	PagesZero    uint64             `json:"pages_zero"`
	PagesHole    uint64             `json:"pages_hole"`

	Postcopy *postcopyResult `json:"postcopy"`

	PagesHinted    uint64 `json:"pages_hinted"`
	HintsReceived  uint64 `json:"hints_received"`
	HintsLate      uint64 `json:"hints_late"`
	HintsRewritten uint64 `json:"hints_rewritten"`
	HintWaitMS     int64  `json:"hint_wait_ms"`
	HintsOff       string `json:"hints_off"`

	Channels         int      `json:"channels"`
	ChannelBytes     []uint64 `json:"channel_bytes"`
	Compression      string   `json:"compression"`
	CompressionRatio float64  `json:"compression_ratio"`
	ThrottlePercent  int      `json:"throttle_percent"`

	Rounds []struct {
		N          int    `json:"n"`
		DurationMS int64  `json:"duration_ms"`
		DirtyPages uint64 `json:"dirty_pages"`
		PagesSent  uint64 `json:"pages_sent"`
		BytesSent  uint64 `json:"bytes_sent"`
	} `json:"rounds"`
}

// inTime are the pages that were hinted before they were sent.
func (r *result) inTime() uint64 { return r.HintsReceived - r.HintsLate }

// migrate runs govmm migrate --json to its end.
func (h *host) migrate(args ...string) (result, int) {
	h.t.Helper()
	out, errs, exit := h.run(append([]string{"migrate", "--json"}, args...)...)
	return decodeResult(h.t, out, errs), exit
}

func decodeResult(t testing.TB, out, errs string) result {
	t.Helper()
	var r result
	d := json.NewDecoder(strings.NewReader(out))
	if err := d.Decode(&r); err != nil {
		t.Fatalf("migrate --json printed %q (%q): %v", out, errs, err)
	}
	if d.More() {
		t.Errorf("migrate --json printed more than one object: %q", out)
	}
	return r
}

// receive starts a destination and returns its address.
func (h *host) receive(name string, args ...string) (*proc, string) {
	h.t.Helper()
	return h.receiveAt(name, "127.0.0.1:0", args...)
}

// receiveAt is receive at another address with port 0.
func (h *host) receiveAt(name, listen string, args ...string) (*proc, string) {
	h.t.Helper()
	p := h.start(append([]string{"receive", name, "--listen", listen}, args...)...)
	at := p.err.awaitText(h.t, 0, "listening on ")
	_, addr, _ := strings.Cut(p.err.snapshot()[at], "listening on ")
	addr = strings.TrimSpace(addr)
	if _, port, err := net.SplitHostPort(addr); err != nil || port == "0" {
		h.t.Fatalf("listening on %q", addr)
	}
	return p, addr
}

// info is part of what govmm info --json prints.
type info struct {
	Name   string `json:"name"`
	PID    int    `json:"pid"`
	State  string `json:"state"`
	CPUs   int    `json:"cpus"`
	Memory uint64 `json:"memory"`
	// MissingPages have not come from the host that the guest has left.
	MissingPages uint64 `json:"missing_pages"`
	Migration    struct {
		BytesSent uint64 `json:"bytes_sent"`
		Phase     string `json:"phase"`
		Error     string `json:"error"`
	} `json:"migration"`
}

// awaitInfo waits until govmm info says what the test waits for.
func (h *host) awaitInfo(name, what string, ok func(info) bool) {
	h.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		i := h.info(name)
		if ok(i) {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("%s: no %s within %v; it says %+v", name, what, patience, i)
		}
	}
}

// awaitMigrating waits until a migration of the VM has sent so many bytes.
func (h *host) awaitMigrating(name string, sent uint64) {
	h.t.Helper()
	h.awaitInfo(name, fmt.Sprintf("migration that has sent %d bytes", sent),
		func(i info) bool { return i.State == "migrating" && i.Migration.BytesSent >= sent })
}

func (h *host) info(name string) info {
	h.t.Helper()
	var i info
	if out := h.must("info", name, "--json"); json.Unmarshal([]byte(out), &i) != nil {
		h.t.Fatalf("info --json printed %q", out)
	}
	return i
}

const (
	mib = 1 << 20
)
