package simtest

import (
	"context"
	"net"
	"path/filepath"
	"sync"
	"testing"

	"github.com/govmm/govmm/migrate"
)

type dial = func(context.Context, string) (net.Conn, error)

// transport is a way to connect two engines. dial nil is the engine's own.
type transport struct {
	name   string
	listen func(t *testing.T) (net.Listener, dial)
	secure bool // TLS on top of it
}

// transports are those that the main tests of the engine run over.
var transports = []transport{
	{name: "tcp", listen: listenTCP},
	{name: "unix", listen: func(t *testing.T) (net.Listener, dial) {
		path := filepath.Join(t.TempDir(), "s")
		ln, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		return ln, func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}
	}},
	{name: "memory", listen: func(*testing.T) (net.Listener, dial) {
		l := Listen()
		return l, l.Dial
	}},
	{name: "tls", listen: listenTCP, secure: true},
}

func listenTCP(t *testing.T) (net.Listener, dial) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln, nil
}

// overEach runs a test over each transport.
func overEach(t *testing.T, f func(*testing.T, transport)) {
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel() // they wait for time-outs more than they work
			f(t, tr)
		})
	}
}

// A control connection that breaks after COMMIT is not the end: the source sends queries
// over the same transport until it knows who runs the guest.
func TestTheVerdictIsAskedFor(t *testing.T) {
	overEach(t, func(t *testing.T, tr transport) {
		w := newWorld(t)
		m, err := NewMachine(w, busyGuest(Layout{ManualProtect: true}))
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Resume(); err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex // guards conns
		var conns []net.Conn
		cut := func() error { // the source gets no RUNNING
			mu.Lock()
			defer mu.Unlock()
			return conns[0].Close()
		}
		to, r := receiverOver(t, tr, &Builder{World: w, Steps: Steps{Start: cut}})
		connect := to.dial
		if connect == nil {
			connect = func(ctx context.Context, address string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "tcp", address)
			}
		}
		o := options()
		o.TLS = to.tls
		o.Dial = func(ctx context.Context, address string) (net.Conn, error) {
			c, err := connect(ctx, address)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				conns = append(conns, c)
			}
			return c, err
		}
		if _, err := migrate.New(m, to.addr, o).Run(context.Background()); err != nil {
			t.Fatal(err)
		}
		<-r.Arrived()
		mu.Lock()
		defer mu.Unlock()
		if err := w.Err(); err != nil || m.Running() || len(conns) < 1+o.Channels+1 {
			t.Errorf("runs at the source: %v, %d connections, %v", m.Running(), len(conns), err)
		}
	})
}
