package test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/govmm/govmm/guest"
)

// A peer is a VMM that the demo guest runs under, govmm itself or one that it is
// compared with. Each gets the same ELF, command line and size of memory.
type peer struct {
	name, version string
	// command starts a guest with as little around it as this VMM can do.
	command func(memMiB int, cmdline string) *exec.Cmd
	// start starts a guest that can move, or a process that waits for one; nil: this
	// VMM has no live migration.
	start func(memMiB int, cmdline string, incoming bool) mover
}

// mover is one end of a migration.
type mover interface {
	process() *exec.Cmd
	serial() *lines
	// to moves the guest. It returns when the guest runs there: the time since the
	// order to move, and how long the guest stood still, where the VMM says so.
	to(dst mover, channels int, limit time.Duration) (total, stop time.Duration)
	// gone ends the process, if the migration has not, and waits for it.
	gone()
}

// peerBinary finds a peer's binary, by variable or on PATH: of several there the one
// whose --version has the highest number.
func peerBinary(variable, name string) (path, version string) {
	candidates := []string{os.Getenv(variable)}
	if candidates[0] == "" {
		candidates = nil
		for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
			candidates = append(candidates, filepath.Join(dir, name))
		}
	}
	var newest []int
	for _, c := range candidates {
		out, err := exec.Command(c, "--version").Output()
		if err != nil {
			continue
		}
		first, _, _ := strings.Cut(string(out), "\n")
		var numbers []int
		for _, word := range strings.FieldsFunc(first, func(r rune) bool { return r < '0' || r > '9' }) {
			n, _ := strconv.Atoi(word)
			numbers = append(numbers, n)
		}
		if path == "" || slices.Compare(numbers, newest) > 0 {
			path, version, newest = c, first, numbers
		}
	}
	return path, version
}

// qemuBinary is the QEMU that tests and benchmarks use; "": there is none.
func qemuBinary() string {
	path, _ := peerBinary("GOVMM_BENCH_QEMU", "qemu-system-x86_64")
	return path
}

// findPeers lists govmm and the peers that are here, and says which are not.
func findPeers(b *testing.B) (all []peer) {
	b.Helper()
	needKVM(b)
	dir, err := os.MkdirTemp("", "gp") // a short path: it holds sockets
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	elf := filepath.Join(dir, "demo.elf")
	if err := os.WriteFile(elf, guest.ELF, 0o600); err != nil {
		b.Fatal(err)
	}
	h := newHost(b)
	serial := 0
	name := func() string { serial++; return fmt.Sprintf("p%d", serial) }
	out, err := h.command("version").Output()
	if err != nil {
		b.Fatal(err)
	}
	all = append(all, peer{
		name: "govmm", version: strings.TrimSpace(string(out)),
		command: func(memMiB int, cmdline string) *exec.Cmd {
			return h.command("run", name(), "--memory", fmt.Sprintf("%dM", memMiB), "--kernel", elf, "--cmdline", cmdline)
		},
		start: func(memMiB int, cmdline string, incoming bool) mover {
			if incoming {
				n := name()
				p, addr := h.receive(n)
				return &govmmMover{h: h, name: n, p: p, addr: addr}
			}
			n := name()
			return &govmmMover{h: h, name: n, p: h.start("run", n, "--memory", fmt.Sprintf("%dM", memMiB), "--kernel", elf, "--cmdline", cmdline)}
		},
	})
	add := func(title, variable, binary string, build func(path string) peer) {
		path, version := peerBinary(variable, binary)
		if path == "" {
			b.Logf("NOT HERE, NOT COMPARED: %s (%s on PATH, or %s)", title, binary, variable)
			return
		}
		p := build(path)
		p.name, p.version = title, version
		all = append(all, p)
	}
	add("QEMU", "GOVMM_BENCH_QEMU", "qemu-system-x86_64", func(path string) peer {
		return peer{
			command: func(memMiB int, cmdline string) *exec.Cmd {
				return exec.Command(path, "-accel", "kvm", "-cpu", "host,-arch-capabilities", "-M", "microvm,acpi=off", "-bios", "qboot.rom",
					"-m", fmt.Sprintf("%dM", memMiB), "-smp", "1", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio",
					"-kernel", elf, "-append", cmdline)
			},
			start: func(memMiB int, cmdline string, incoming bool) mover {
				return qemuMover{startQEMU(b, memMiB, 1, cmdline, incoming)}
			},
		}
	})
	remote, _ := peerBinary("GOVMM_BENCH_CH_REMOTE", "ch-remote")
	if ch := os.Getenv("GOVMM_BENCH_CH"); remote == "" && ch != "" {
		remote = filepath.Join(filepath.Dir(ch), "ch-remote")
	}
	add("Cloud Hypervisor", "GOVMM_BENCH_CH", "cloud-hypervisor", func(path string) peer {
		p := peer{command: func(memMiB int, cmdline string) *exec.Cmd {
			return exec.Command(path, "--seccomp", "false", "--cpus", "boot=1", "--memory", fmt.Sprintf("size=%dM", memMiB),
				"--serial", "tty", "--console", "off", "--kernel", elf, "--cmdline", cmdline)
		}}
		if remote == "" {
			b.Log("NOT HERE, NO MIGRATIONS OF CLOUD HYPERVISOR: ch-remote")
			return p
		}
		p.start = func(memMiB int, cmdline string, incoming bool) mover {
			cmd := exec.Command(path, "--seccomp", "false")
			if !incoming {
				cmd = p.command(memMiB, cmdline)
			}
			return startCloudHypervisor(b, cmd, remote, filepath.Join(dir, name()), incoming)
		}
		return p
	})
	add("Firecracker", "GOVMM_BENCH_FC", "firecracker", func(path string) peer {
		return peer{command: func(memMiB int, cmdline string) *exec.Cmd {
			config := filepath.Join(dir, name()+".json")
			text, err := json.Marshal(map[string]any{"boot-source": map[string]any{"kernel_image_path": elf, "boot_args": cmdline},
				"drives": []any{}, "machine-config": map[string]any{"vcpu_count": 1, "mem_size_mib": memMiB}})
			if err == nil {
				err = os.WriteFile(config, text, 0o600)
			}
			if err != nil {
				b.Fatal(err)
			}
			return exec.Command(path, "--no-api", "--no-seccomp", "--level", "Off", "--config-file", config)
		}}
	})
	for _, p := range all {
		b.Logf("%-16s %s", p.name, p.version)
	}
	return all
}

// govmmMover is a govmm process.
type govmmMover struct {
	h    *host
	name string
	p    *proc
	addr string
}

func (m *govmmMover) process() *exec.Cmd { return m.p.cmd }
func (m *govmmMover) serial() *lines     { return m.p.out }

func (m *govmmMover) to(dst mover, channels int, limit time.Duration) (total, stop time.Duration) {
	began := time.Now()
	r, exit := m.h.migrate(m.name, "--to", dst.(*govmmMover).addr, "--channels", strconv.Itoa(channels), "--downtime-limit", limit.String())
	total = time.Since(began)
	if exit != 0 {
		m.h.t.Fatalf("%+v", r)
	}
	return total, time.Duration(r.DowntimeMS * float64(time.Millisecond))
}

func (m *govmmMover) gone() {
	select {
	case <-m.p.done: // it ends by itself
	case <-time.After(patience):
		m.p.kill(unix.SIGKILL)
		<-m.p.done
	}
}

// qemuMover is a QEMU process.
type qemuMover struct{ *qemu }

func (m qemuMover) process() *exec.Cmd { return m.cmd }
func (m qemuMover) serial() *lines     { return m.out }
func (m qemuMover) gone()              { m.end() }

func (m qemuMover) to(dst mover, channels int, limit time.Duration) (total, stop time.Duration) {
	m.limit = limit
	r := m.migrate(dst.(qemuMover).qemu, channels)
	return r.Total, r.Downtime
}

// cloudHypervisor is a Cloud Hypervisor process.
type cloudHypervisor struct {
	b         *testing.B
	cmd       *exec.Cmd
	out       *lines
	remote    string // ch-remote
	socket    string
	addr      string    // where it waits for a guest
	receiving *exec.Cmd // ch-remote, which waits as long
	end       func()

	mu     sync.Mutex // guards events
	events map[string]time.Time
}

func startCloudHypervisor(b *testing.B, cmd *exec.Cmd, remote, socket string, incoming bool) *cloudHypervisor {
	b.Helper()
	m := &cloudHypervisor{b: b, cmd: cmd, out: newLines(), remote: remote, socket: socket, events: map[string]time.Time{}}
	events, theirs, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	cmd.Args = append(cmd.Args, "--api-socket", socket, "--event-monitor", "fd=3")
	cmd.ExtraFiles = []*os.File{theirs}
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		b.Fatal(err)
	}
	theirs.Close()
	var readers sync.WaitGroup
	readers.Go(func() { m.out.from(stdout) })
	readers.Go(func() {
		defer events.Close()
		for dec := json.NewDecoder(events); ; {
			var e struct{ Source, Event string }
			if dec.Decode(&e) != nil {
				return
			}
			m.mu.Lock()
			m.events[e.Source+" "+e.Event] = time.Now()
			m.mu.Unlock()
		}
	})
	m.end = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		readers.Wait()
		_ = cmd.Wait() // killed
		if m.receiving != nil {
			_ = m.receiving.Wait()
		}
	})
	b.Cleanup(m.end)
	m.await("its API socket", func() bool { return exec.Command(remote, "--api-socket", socket, "ping").Run() == nil })
	if incoming {
		m.receive("")
	}
	return m
}

// receive begins to wait for a guest, in a way.
func (m *cloudHypervisor) receive(how string) {
	m.b.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		m.b.Fatal(err)
	}
	m.addr = "tcp:" + ln.Addr().String()
	port := ln.Addr().(*net.TCPAddr).Port
	ln.Close()
	m.receiving = exec.Command(m.remote, "--api-socket", m.socket, "receive-migration", "receiver_url="+m.addr+how)
	if err := m.receiving.Start(); err != nil {
		m.b.Fatal(err)
	}
	m.await("its port", func() bool { return listens(m.b, port) })
}

// listens says whether a process listens on the TCP port (proc_net_tcp.rst).
func listens(b *testing.B, port int) bool {
	text, err := os.ReadFile("/proc/thread-self/net/tcp") // the caller may be in another network
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 3 && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) && f[3] == "0A" {
			return true
		}
	}
	return false
}

func (m *cloudHypervisor) await(what string, ready func() bool) {
	m.b.Helper()
	for deadline := time.Now().Add(patience); !ready(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			m.b.Fatalf("Cloud Hypervisor: waited in vain for %s", what)
		}
	}
}

func (m *cloudHypervisor) process() *exec.Cmd { return m.cmd }
func (m *cloudHypervisor) serial() *lines     { return m.out }
func (m *cloudHypervisor) gone()              { m.end() }

// at is when the VMM reported the event; zero: not yet.
func (m *cloudHypervisor) at(event string) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.events[event]
}

func (m *cloudHypervisor) to(dst mover, channels int, limit time.Duration) (total, stop time.Duration) {
	there := dst.(*cloudHypervisor)
	began := time.Now()
	m.send(there, fmt.Sprintf(",connections=%d,downtime_ms=%d", channels, limit.Milliseconds()))
	there.await("the guest to run at its destination", func() bool { return !there.at("vm resumed").IsZero() })
	running := there.at("vm resumed")
	m.await("the source's word that it paused", func() bool { return !m.at("vm paused").IsZero() })
	return running.Sub(began), running.Sub(m.at("vm paused"))
}

// send begins to move the guest, in a way.
func (m *cloudHypervisor) send(there *cloudHypervisor, how string) {
	m.b.Helper()
	out, err := exec.Command(m.remote, "--api-socket", m.socket, "send-migration", "destination_url="+there.addr+how).CombinedOutput()
	if err != nil {
		m.b.Fatalf("send-migration: %v: %s", err, out)
	}
}

// warmMemory touches memory and frees it again, most of what is free: on a host that is a
// virtual machine itself, memory that its own host has to find first costs up to ten
// times as much, at random. What is allocated next is then cheap for every peer.
func warmMemory(b *testing.B) {
	b.Helper()
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		b.Fatal(err)
	}
	const reserve, most = 3 << 30, 12 << 30
	free := int64(info.Freeram) * int64(info.Unit)
	size := min(free-reserve, most) &^ (2*mib - 1)
	if size <= 0 {
		return
	}
	p, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		b.Fatal(err)
	}
	_ = unix.Madvise(p, unix.MADV_HUGEPAGE) // a kernel without huge pages
	for i := 0; i < len(p); i += 4096 {
		p[i] = 1
	}
	if err := unix.Munmap(p); err != nil {
		b.Fatal(err)
	}
}

// figures are what the turns of one peer have measured, by name.
type figures map[string][]float64

// comparison collects the figures of all peers, turn by turn.
type comparison struct {
	b     *testing.B
	peers []peer
	got   map[string]figures
}

func compare(b *testing.B) *comparison {
	c := &comparison{b: b, peers: findPeers(b), got: map[string]figures{}}
	for _, p := range c.peers {
		c.got[p.name] = figures{}
	}
	return c
}

func (c *comparison) add(p peer, figure string, v float64) {
	c.got[p.name][figure] = append(c.got[p.name][figure], v)
}

// report prints the medians of each peer, and how many times govmm's they are: the
// median of the turns. More than 1 is better for govmm.
func (c *comparison) report(names ...string) {
	c.b.Helper()
	c.b.ReportMetric(0, "ns/op") // the time of all turns together means nothing
	for _, p := range c.peers {
		if len(c.got[p.name][names[0]]) == 0 {
			continue // it cannot do this
		}
		var line strings.Builder
		fmt.Fprintf(&line, "%-17s", p.name)
		for _, name := range names {
			v := c.got[p.name][name]
			fmt.Fprintf(&line, "  %s %.3g", name, median(v))
			if p.name == "govmm" {
				c.b.ReportMetric(median(v), strings.ReplaceAll(name, " ", "-"))
				continue
			}
			var r []float64
			for i := range v {
				r = append(r, v[i]/max(c.got["govmm"][name][i], 1e-9))
			}
			fmt.Fprintf(&line, " (%.2f)", median(r))
			c.b.ReportMetric(median(r), strings.ReplaceAll(p.name+"-"+name, " ", "-")+"-ratio")
		}
		c.b.Log(line.String())
	}
}

// of is the median of a peer's figure; false if that peer is not here.
func (c *comparison) of(name, figure string) (float64, bool) {
	v := c.got[name][figure]
	if len(v) == 0 {
		return 0, false
	}
	return median(v), true
}

// move migrates a fresh guest once, and adds its figures under a suffix: seconds from the
// command to its running at the destination, processor seconds of both ends, the source
// until it has gone, and milliseconds of standing still.
func (c *comparison) move(p peer, memMiB int, cmdline, until string, channels int, limit time.Duration, suffix string) {
	c.b.Helper()
	if p.start == nil {
		return
	}
	src := p.start(memMiB, cmdline, false)
	src.serial().awaitText(c.b, 0, until)
	warmMemory(c.b)
	dst := p.start(memMiB, cmdline, true)
	before := cpuTime(c.b, src.process().Process.Pid) + cpuTime(c.b, dst.process().Process.Pid)
	total, stop := src.to(dst, channels, limit)
	after := cpuTime(c.b, dst.process().Process.Pid)
	src.gone()
	state := src.process().ProcessState
	after += state.UserTime() + state.SystemTime()
	_ = dst.process().Process.Kill()
	dst.gone()
	c.add(p, "s"+suffix, total.Seconds())
	c.add(p, "cpu-s"+suffix, (after - before).Seconds())
	c.add(p, "stop-ms"+suffix, float64(stop.Microseconds())/1000)
}

// migrations compares migrations by each number of channels.
func migrations(b *testing.B, memMiB int, cmdline, until string, limit time.Duration, channels ...int) *comparison {
	b.Helper()
	c := compare(b)
	for b.Loop() {
		for _, n := range channels {
			for _, p := range c.peers {
				c.move(p, memMiB, cmdline, until, n, limit, fmt.Sprintf(" %d", n))
			}
		}
	}
	for _, n := range channels {
		b.Logf("channels: %d", n)
		c.report(fmt.Sprintf("s %d", n), fmt.Sprintf("cpu-s %d", n), fmt.Sprintf("stop-ms %d", n))
	}
	return c
}

// firstByte starts a VMM and returns the time until its guest's first serial byte,
// skipping lines of the VMM itself, and the process, which end ends.
func firstByte(b *testing.B, cmd *exec.Cmd) (took time.Duration, end func()) {
	b.Helper()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	began := time.Now()
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	r := bufio.NewReader(stdout)
	for {
		c, err := r.ReadByte()
		took = time.Since(began)
		if err == nil && c != 'g' { // not "govmm demo guest"
			_, err = r.ReadString('\n')
		} else if err == nil {
			break
		}
		if err != nil {
			_ = cmd.Wait()
			b.Fatalf("%s ended before its guest said anything: %s", cmd.Path, stderr.String())
		}
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		_, _ = io.Copy(io.Discard, r)
	}()
	return took, func() {
		_ = cmd.Process.Kill()
		<-read
		_ = cmd.Wait() // killed
	}
}
