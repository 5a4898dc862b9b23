package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

var namespaces atomic.Int32

// inNamespace calls f in a network namespace. The sockets that it makes belong to that.
func inNamespace(name string, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
		ns, err := os.Open("/run/netns/" + name)
		if err == nil {
			defer ns.Close()
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// cable makes two network namespaces that are joined by a cable of a rate in both
// directions, as tc(8) writes it, with queues of so many bytes.
func cable(t testing.TB, rate string, queue int) (a, b string) {
	t.Helper()
	testenv.NeedRoot(t, "to make network namespaces")
	testenv.NeedTools(t, "ip", "tc")
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	id := fmt.Sprintf("gs%d-%d", os.Getpid()%100000, namespaces.Add(1))
	a, b = id+"a", id+"b"
	for _, ns := range []string{a, b} {
		run("ip", "netns", "add", ns)
		t.Cleanup(func() { run("ip", "netns", "del", ns) })
	}
	run("ip", "link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b)
	for i, ns := range []string{a, b} {
		run("ip", "-n", ns, "addr", "add", fmt.Sprintf("10.8.0.%d/24", i+1), "dev", "cable")
		run("ip", "-n", ns, "link", "set", "cable", "up")
		run("tc", "-n", ns, "qdisc", "add", "dev", "cable", "root", "tbf", "rate", rate, "burst", "3000", "limit", fmt.Sprint(queue))
	}
	return a, b
}

// shallow makes a socket's buffers as small as the kernel lets them be.
func shallow(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, 1)
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 1)
	})
}

// TestSlowCables migrates over real sockets and slow cables, with buffers from the
// smallest to what the kernel tunes them to, and queues that hold two packets or more than
// the cable carries in a minute. Each migration takes several time-outs.
func TestSlowCables(t *testing.T) {
	testenv.NotShort(t, "slow cables take their time")
	var all sync.WaitGroup
	defer all.Wait() // before the namespaces go
	for _, c := range []struct {
		rate  string
		queue int
		pages int
	}{
		{"100kbit", 6000, 12}, {"100kbit", 1 << 20, 12}, {"8mbit", 6000, 1000}, {"8mbit", 8 << 20, 1000},
	} {
		for _, buffers := range []string{"shallow", "deep"} {
			for _, channels := range []int{1, 16} {
				a, b := cable(t, c.rate, c.queue)
				all.Go(func() {
					took, err := overCable(t, a, b, buffers == "shallow", channels, c.pages)
					t.Logf("%s, queue of %d, %s buffers, %d channels: %v", c.rate, c.queue, buffers, channels, took.Round(time.Millisecond))
					if err != nil {
						t.Errorf("%s, queue of %d, %s buffers, %d channels: %v", c.rate, c.queue, buffers, channels, err)
					}
				})
			}
		}
	}
}

// overCable migrates a guest that has content in so many pages, all of which it writes
// again before it is stopped.
func overCable(t *testing.T, a, b string, small bool, channels, pages int) (took time.Duration, err error) {
	const timeout = 2 * time.Second
	var lc net.ListenConfig
	var d net.Dialer
	if small {
		lc.Control, d.Control = shallow, shallow
	}
	var ln net.Listener
	if err := inNamespace(b, func() (err error) {
		ln, err = lc.Listen(context.Background(), "tcp", "10.8.0.2:0")
		return err
	}); err != nil {
		return 0, err
	}
	runs := &whoRuns{t: t, who: map[string]bool{}}
	src := &patientSource{toySource: newToySource(t, runs), busy: true, state: []byte("state")}
	src.mem[0] = bytes.Repeat([]byte{9}, pages*mempage.Size)
	src.mem[1] = src.mem[1][:mempage.Size]
	target := &toyTarget{heapTarget: heapTarget{t: t, mem: [2][]byte{make([]byte, len(src.mem[0])), make([]byte, mempage.Size)}}, runs: runs}
	lines := make(chan string, 16)
	recv := NewReceiver(buildFunc(func(context.Context, []byte) (Target, error) { return target, nil }), newLineLog(lines))
	recv.timeout = timeout
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- recv.Serve(ctx, ln) }()
	m := New(src, ln.Addr().String(), Options{Channels: channels, DowntimeLimit: time.Hour, PeerTimeout: timeout, VerifyPages: true,
		Dial: func(ctx context.Context, address string) (nc net.Conn, err error) {
			err = inNamespace(a, func() (err error) {
				nc, err = d.DialContext(ctx, "tcp", address)
				return err
			})
			return nc, err
		}})
	_, err = m.Run(context.Background())
	cancel()
	if err = errors.Join(err, <-served); err != nil {
		return 0, fmt.Errorf("%w; the destination: %q", err, drained(lines))
	}
	if !bytes.Equal(src.mem[0], target.mem[0]) {
		err = errors.New("memory differs")
	}
	return m.Result().Total, err
}
