package test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/test/kernel"
)

// guestSocket is a connection to a port of a guest, through the unix socket of its
// socket device (docs/vsock.md).
type guestSocket struct {
	net.Conn
	t testing.TB
	r *bufio.Reader
}

func dialGuest(t testing.TB, path string, port int) *guestSocket {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	s := &guestSocket{Conn: c, t: t, r: bufio.NewReader(c)}
	if _, err := fmt.Fprintf(c, "CONNECT %d\n", port); err != nil {
		t.Fatal(err)
	}
	if line, err := s.r.ReadString('\n'); err != nil || !strings.HasPrefix(line, "OK ") {
		t.Fatalf("CONNECT %d: %q, %v", port, line, err)
	}
	return s
}

// echoes checks that the guest sends back what it gets.
func (s *guestSocket) echoes(size int) {
	s.t.Helper()
	said := make([]byte, size)
	for i := range said {
		said[i] = byte(i * 7)
	}
	written := make(chan error, 1)
	go func() {
		_, err := s.Write(said)
		written <- err
	}()
	got := make([]byte, size)
	n, err := io.ReadFull(s.r, got)
	if err != nil || string(got) != string(said) {
		s.t.Fatalf("%d bytes of %d came back, equal: %v; %v", n, size, string(got) == string(said), err)
	}
	if err := <-written; err != nil {
		s.t.Fatal(err)
	}
}

// TestLinuxVsock: Linux's own driver of the socket device, in Debian's cloud kernel. A
// program in the guest takes a connection from the host, and connects to the host. A
// migration resets all connections; new ones are made through the destination's socket.
func TestLinuxVsock(t *testing.T) {
	needSVM(t)
	program, err := kernel.VsockEcho()
	if err != nil {
		t.Fatal(err)
	}
	bzImage, initrd := debianFiles(t, kernel.File{Name: "vsockecho", Data: program})
	h := newHost(t)
	path := func(i int) string { return filepath.Join(h.dir, fmt.Sprintf("v%d", i)) }
	vm := &shell{proc: h.start("run", "at0", "--memory", "256M", "--kernel", bzImage, "--initrd", initrd,
		"--cmdline", debianCmdline(), "--vsock", "path="+path(0)+",cid=42")}
	vm.awaitLong(0, "init: ready")
	vm.does("/vsockecho listen 1234 & true")
	vm.awaitLong(0, "vsockecho: listening on 1234")

	vm.callsHost(path(0))
	old := dialGuest(t, path(0), 1234)
	old.echoes(5)
	old.echoes(mib)
	for i := range 2 {
		next, addr := h.receive(fmt.Sprintf("at%d", i+1), "--vsock", "path="+path(i+1))
		got, exit := h.migrate(fmt.Sprintf("at%d", i), "--to", addr, "--downtime-limit", "3s")
		if exit != 0 || got.Status != "completed" {
			t.Fatalf("migration %d: exit %d, %+v", i, exit, got)
		}
		vm.wait()
		vm.proc = next
		vm.awaitLong(0, "vsockecho: connection ends: connection reset by peer")
		if n, err := old.r.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, net.ErrClosed) || isTimeout(err) {
			t.Errorf("the host's end of a connection of before: %d bytes, %v", n, err)
		}
		if c, err := net.Dial("unix", path(i)); err == nil {
			c.Close()
			t.Error("the socket of before still listens")
		}
		old = dialGuest(t, path(i+1), 1234)
		old.echoes(5)
		old.echoes(mib)
		vm.callsHost(path(i + 1))
		vm.quietly(0)
	}
	h.must("stop", "--force", "at2")
}

// callsHost checks that a program in the guest can connect to one on the host that
// listens on port 52.
func (s *shell) callsHost(path string) {
	s.t.Helper()
	ln, err := net.Listen("unix", path+"_52")
	if err != nil {
		s.t.Fatal(err)
	}
	defer ln.Close()
	said := make(chan string, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			said <- err.Error()
			return
		}
		defer c.Close()
		line, _ := bufio.NewReader(c).ReadString('\n')
		_, _ = io.WriteString(c, "well heard")
		said <- line
	}()
	if got := s.does("/vsockecho dial 52 hello"); !strings.Contains(got, `the host says "well heard"`) {
		s.t.Errorf("a call to the host: %q", got)
	}
	select {
	case line := <-said:
		if line != "hello\n" {
			s.t.Errorf("the guest said %q", line)
		}
	case <-time.After(patience):
		s.t.Error("the guest did not connect")
	}
	if got := s.does("/vsockecho dial 53 hello"); !strings.Contains(got, "connection reset") {
		s.t.Errorf("a call to nobody: %q", got)
	}
}

func isTimeout(err error) bool {
	e, ok := errors.AsType[net.Error](err)
	return ok && e.Timeout()
}
