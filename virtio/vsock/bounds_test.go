package vsock

import (
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A guest that takes nothing and ends each connection as soon as it is made leaves nothing
// of them behind.
func TestEndedConnectionsAreForgotten(t *testing.T) {
	for name, features := range layouts {
		t.Run(name, func(t *testing.T) {
			r := newBareRig(t, features) // no receive buffers
			l := r.listen(52)
			accepted := make(chan net.Conn)
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						close(accepted)
						return
					}
					accepted <- c
				}
			}()
			// The first connection stays, and is the first to have something for the guest.
			stays := &peer{r: r, host: 52, guest: 1, alloc: bufferSize}
			stays.send(opRequest, 0, nil)
			c := <-accepted
			defer func() { _ = c.Close(); _ = l.Close() }()
			for i := range uint32(3 * maxConnections) {
				p := &peer{r: r, host: 52, guest: 2 + i, alloc: bufferSize}
				p.send(opRequest, 0, nil)
				c := <-accepted
				r.established(2)
				p.send(opReset, 0, nil)
				_ = c.Close()
				r.released(1)
				r.d.serving.Lock()
				n := len(r.d.ready)
				r.d.serving.Unlock()
				if n > 2 {
					t.Fatalf("after %d connections %d wait to send to the guest", i+1, n)
				}
			}
			r.d.Reset()
			r.released(0)
		})
	}
}

// established waits until the device has n connections that are established.
func (r *rig) established(n int) {
	r.t.Helper()
	have := func() (have int) {
		r.d.serving.Lock()
		defer r.d.serving.Unlock()
		for _, c := range r.d.conns {
			if c.established {
				have++
			}
		}
		return have
	}
	for end := time.Now().Add(patience); have() != n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("%d connections are established, expected were %d", have(), n)
		}
	}
}

// A guest that opens connections without end leaves the process three of four descriptors;
// the rest is refused with RST.
func TestDescriptorsAreLeft(t *testing.T) {
	const files, most = 256, 64
	var before unix.Rlimit
	check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &before))
	check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: files, Max: before.Max}))
	t.Cleanup(func() { check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &before)) })

	r := newRig(t, layouts["split"])
	l := r.listen(52)
	made, refused := 0, 0
	for i := range uint32(4 * most) {
		(&peer{r: r, host: 52, guest: 1000 + i, alloc: bufferSize}).send(opRequest, 0, nil)
		switch h, _ := r.recv(); h.Op {
		case opResponse:
			c, err := l.AcceptUnix()
			check(t, err)
			t.Cleanup(func() { _ = c.Close() })
			made++
		case opReset:
			refused++
		default:
			t.Fatalf("%+v", h)
		}
	}
	if made != most || refused != 3*most {
		t.Errorf("%d connections were made, %d refused; expected were %d and %d", made, refused, most, 3*most)
	}
	c := dial(t, r.path) // a program of the host is refused, too, and hears it
	c.end()
	for range files / 4 {
		f, err := os.Open("/dev/null")
		check(t, err)
		t.Cleanup(func() { _ = f.Close() })
	}
}

// What the guest sends to a program that does not read takes at most two buffers of a
// connection, in packets of any length; beyond its credit the connection ends.
func TestUnreadDataIsBounded(t *testing.T) {
	for _, n := range []int{1, 100, 4096, 30000} {
		r := newRig(t, layouts["split"])
		l := r.listen(52)
		_, p := r.request(l, 1000, 52)
		at := ports{52, 1000}
		r.d.serving.Lock()
		c := r.d.conns[at]
		r.d.serving.Unlock()
		payload := make([]byte, n)
		for {
			r.d.serving.Lock()
			held, ended := cap(c.in)+c.writing, c.ended
			r.d.serving.Unlock()
			if held > 2*bufferSize {
				t.Fatalf("packets of %d bytes: %d bytes are held", n, held)
			}
			if ended {
				break
			}
			p.send(opData, 0, payload)
		}
		if p.sent < bufferSize {
			t.Errorf("packets of %d bytes: the connection has ended after %d bytes", n, p.sent)
		}
	}
}
