package test

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// udpPort is a UDP port of this host's loopback address that nobody has.
func udpPort(t testing.TB) int {
	t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).Port
}

// echoAt starts a client that sends to a port of this host.
func echoAt(t testing.TB, port int) *echoes {
	t.Helper()
	c, err := net.Dial("udp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	e := &echoes{conn: c, stop: make(chan struct{}), answered: map[uint32]bool{}}
	e.all.Go(e.send)
	e.all.Go(e.receive)
	t.Cleanup(e.end)
	return e
}

// networks are the processes of user networks that a process has: the ones that start others,
// and the networks.
func networks(t testing.TB, vmm int) (starters, workers []int) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	parents, kinds := map[int]int{}, map[int]string{}
	for _, dir := range all {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		words, err := os.ReadFile(dir + "/cmdline")
		stat, err2 := os.ReadFile(dir + "/stat")
		if err != nil || err2 != nil || !strings.Contains(string(words), "__user-network") {
			continue
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		if f := strings.Fields(rest); len(f) > 1 && f[0] != "Z" {
			parents[pid], _ = strconv.Atoi(f[1])
			kinds[pid] = strings.Split(string(words), "\x00")[1]
		}
	}
	for pid, kind := range kinds {
		if kind == "__user-network" && parents[pid] == vmm {
			starters = append(starters, pid)
		}
	}
	for pid, kind := range kinds {
		if kind == "__user-network-process" && len(starters) == 1 && parents[pid] == starters[0] {
			workers = append(workers, pid)
		}
	}
	return starters, workers
}

func status(t testing.TB, pid int, field string) string {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		if value, ok := strings.CutPrefix(line, field+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	t.Fatalf("process %d has no %s", pid, field)
	return ""
}

// TestUserNet: a guest is reached by a forward of its user network, whose process is in a
// sandbox; it goes on when that process is killed; it moves on one host with the same port,
// and to another port; and no process stays behind.
func TestUserNet(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	port, next := udpPort(t), udpPort(t)
	forward := fmt.Sprintf("user,forward=udp:%d:7", port)
	here := h.start("run", "u0", "--memory", "64M", "--net", forward, "--cmdline", "fill=8M dirty=2M rate=50 verify=1 tick=0.5 ip=192.168.127.2")
	here.out.awaitText(t, 0, "filled ")
	client := echoAt(t, port)
	client.await(t, 5)

	starters, workers := networks(t, here.cmd.Process.Pid)
	if len(starters) != 1 || len(workers) != 1 {
		t.Fatalf("processes of the network: %v and %v, expected one of each", starters, workers)
	}
	for field, want := range map[string]string{"Seccomp": "2", "NoNewPrivs": "1", "CapEff": "0000000000000000"} {
		if got := status(t, workers[0], field); got != want {
			t.Errorf("the network's process: %s %s, expected %s", field, got, want)
		}
	}
	client.await(t, 30) // 3 s
	if _, again := networks(t, here.cmd.Process.Pid); len(again) != 1 || again[0] != workers[0] {
		t.Errorf("the network's process was %v and is %v: it must not end by itself\n%s", workers, again, here.err.tail(10))
	}
	// Another VM cannot have the port, and says so.
	_, errs, exit := h.run("run", "other", "--memory", "64M", "--net", forward)
	if want := fmt.Sprintf("net user: forward=udp:127.0.0.1:%d:7: take port %d of this host: address already in use", port, port); exit != 1 || !strings.Contains(errs, want) {
		t.Errorf("another VM with the same port: exit %d, %q, expected %q", exit, errs, want)
	}

	if err := syscall.Kill(workers[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	here.err.awaitText(t, 0, "the guest's link is down")
	here.err.awaitText(t, 0, "the process of the network has ended")
	here.err.awaitText(t, 0, "connected again, the guest's link is up")
	client.await(t, 5)

	for i, to := range []int{port, next} {
		name := fmt.Sprintf("u%d", i+1)
		there, addr := h.receive(name, "--net", fmt.Sprintf("user,forward=udp:%d:7", to))
		r, exit := h.migrate(fmt.Sprintf("u%d", i), "--to", addr, "--downtime-limit", "3s")
		if exit != 0 || r.Status != "completed" {
			t.Fatalf("migration %d: exit %d, %+v", i, exit, r)
		}
		here.wait()
		client.end()
		client = echoAt(t, to)
		client.await(t, 5)
		t.Logf("migration %d: downtime %.1f ms", i, r.DowntimeMS)
		here = there
	}
	if stdout, errs, exit := h.run("upgrade", "u2"); exit != 0 {
		t.Fatalf("upgrade: exit %d, %s%s", exit, stdout, errs)
	}
	client.end()
	client = echoAt(t, next)
	client.await(t, 5)
	c, err := net.Dial("udp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _ = c.Write(binary.BigEndian.AppendUint32(nil, 1))
	_ = c.SetReadDeadline(time.Now().Add(time.Second))
	if _, err := c.Read(make([]byte, 10)); err == nil {
		t.Error("the port of the host where the guest was still answers")
	}
	pid := h.info("u2").PID
	starters, workers = networks(t, pid)
	if len(starters) != 1 || len(workers) != 1 {
		t.Errorf("processes of the network: %v and %v, expected one of each", starters, workers)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil { // nobody tells them
		t.Fatal(err)
	}
	here.wait()
	for limit := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		left := 0
		for _, pid := range append(starters, workers...) {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err == nil && !strings.Contains(string(stat), ") Z ") {
				left++
			}
		}
		if left == 0 {
			return
		}
		if time.Now().After(limit) {
			t.Fatalf("%d processes of the network are left behind", left)
		}
	}
}

// TestUserNetRestored: a guest that is restored has a network of this command's.
func TestUserNetRestored(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	port, dir := udpPort(t), filepath.Join(t.TempDir(), "s")
	p := h.start("run", "a", "--memory", "64M", "--net", "user", "--cmdline", "fill=8M tick=0.5 ip=192.168.127.2")
	p.out.awaitText(t, 0, "tick 1 ")
	h.mustSnapshot("a", "--to", dir, "--stop")
	h.start("run", "b", "--from", dir, "--net", fmt.Sprintf("user,forward=udp:%d:7", port))
	echoAt(t, port).await(t, 5)
}
