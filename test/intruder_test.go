package test

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// intruder is a third host of a test network, from which the test itself connects and
// listens. It has no bridge.
type intruder struct {
	*site
}

// newIntruder puts one, at 10.9.0.5, on the bridge of a site.
func newIntruder(t testing.TB, at *site) *intruder {
	t.Helper()
	s := &site{host: newHost(t), ns: at.ns + "x", ip: "10.9.0.5"}
	ip(t, "netns", "add", s.ns)
	t.Cleanup(func() { ip(t, "netns", "del", s.ns) })
	ip(t, "link", "add", "tap-x", "netns", at.ns, "type", "veth", "peer", "name", "eth0", "netns", s.ns)
	at.inside("link", "set", "tap-x", "master", at.bridge)
	at.inside("link", "set", "tap-x", "up")
	s.inside("addr", "add", s.ip+"/24", "dev", "eth0")
	s.inside("link", "set", "eth0", "up")
	return &intruder{s}
}

// there calls f in the intruder's namespace. A socket stays in the one where it was made.
func (x *intruder) there(f func() error) {
	x.t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
		ns, err := os.Open("/run/netns/" + x.ns)
		if err == nil {
			defer ns.Close()
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		x.t.Fatal(err)
	}
}

func (x *intruder) dial(addr string) (c net.Conn) {
	x.t.Helper()
	x.there(func() (err error) {
		c, err = net.DialTimeout("tcp", addr, patience)
		return err
	})
	return c
}

func (x *intruder) listen() (ln net.Listener) {
	x.t.Helper()
	x.there(func() (err error) {
		ln, err = net.Listen("tcp", x.ip+":0")
		return err
	})
	return ln
}

// gets says something on a new connection and returns all that comes back. over nil:
// it is said plain.
func (x *intruder) gets(addr string, over *tls.Config, say []byte) []byte {
	x.t.Helper()
	c := x.dial(addr)
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	stream := io.ReadWriter(c)
	if over != nil {
		stream = tls.Client(c, over)
	}
	_, _ = stream.Write(say) // it may be cut off
	if over == nil {
		_ = c.(*net.TCPConn).CloseWrite()
	} else if err := stream.(*tls.Conn).CloseWrite(); err != nil {
		return nil // refused in the handshake
	}
	got, _ := io.ReadAll(stream) // to the end, whatever that is
	return got
}

// middle is a wire through the intruder. It records what passes, and may change it.
type middle struct {
	x    *intruder
	addr string // for the source
	to   string // the destination
	all  sync.WaitGroup
	ln   net.Listener

	mu     sync.Mutex // guards the fields below
	said   []*bytes.Buffer
	heard  []*bytes.Buffer
	open   []net.Conn
	change func(at int64, p []byte) // of what goes to the destination; at is its offset in all of that
	passed int64
}

func (x *intruder) between(to string) *middle {
	x.t.Helper()
	m := &middle{x: x, ln: x.listen(), to: to}
	m.addr = m.ln.Addr().String()
	m.all.Go(func() {
		for {
			c, err := m.ln.Accept()
			if err != nil {
				return
			}
			m.all.Go(func() { m.serve(c) })
		}
	})
	x.t.Cleanup(m.end)
	return m
}

func (m *middle) end() {
	m.ln.Close()
	m.mu.Lock()
	for _, c := range m.open {
		c.Close()
	}
	m.mu.Unlock()
	m.all.Wait()
}

func (m *middle) serve(a net.Conn) {
	defer a.Close()
	b := m.x.dial(m.to)
	defer b.Close()
	said, heard := new(bytes.Buffer), new(bytes.Buffer)
	m.mu.Lock()
	m.said, m.heard = append(m.said, said), append(m.heard, heard)
	m.open = append(m.open, a, b)
	m.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() { m.pump(a, b, said, true) })
	both.Go(func() { m.pump(b, a, heard, false) })
	both.Wait()
}

func (m *middle) pump(from, to net.Conn, record *bytes.Buffer, there bool) {
	defer to.(*net.TCPConn).CloseWrite()
	p := make([]byte, 64<<10)
	for {
		n, err := from.Read(p)
		m.mu.Lock()
		record.Write(p[:n])
		if there {
			if m.change != nil {
				m.change(m.passed, p[:n])
			}
			m.passed += int64(n)
		}
		m.mu.Unlock()
		if _, werr := to.Write(p[:n]); err != nil || werr != nil {
			return
		}
	}
}

// recorded is what the source said, by connection, once all of them have ended.
func (m *middle) recorded() (said [][]byte) {
	m.end()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, b := range m.said {
		said = append(said, b.Bytes())
	}
	return said
}

// saw reports whether a text passed, in either direction, once all connections have ended.
func (m *middle) saw(text []byte) bool {
	m.end()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, b := range append(m.said, m.heard...) {
		if bytes.Contains(b.Bytes(), text) {
			return true
		}
	}
	return false
}
