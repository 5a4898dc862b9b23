package migrate

import (
	"bytes"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/govmm/govmm/mempage"
)

// tlsListener makes the receiver of [migrateOver] one with TLS.
type tlsListener struct {
	*slowNet
	config *tls.Config
}

// A migration over TLS may be as slow as any: a write that took longer than the time-out
// would leave a tls.Conn broken.
func TestSlowTLSIsNotDead(t *testing.T) {
	p := newTLSPair(t)
	synctest.Test(t, func(t *testing.T) {
		n := newSlowNet(100e3/8, 64<<10)
		_, line, err := migrateOver(t, n, tlsListener{n, p.server()}, true, nil, Options{DowntimeLimit: time.Hour, VerifyPages: true,
			Dial: n.Dial, TLS: p.client()})
		if err != nil {
			t.Errorf("%v; %s", err, line)
		}
	})
}

// TLS goes over the flow too, which then counts what is on the wire.
func TestTLSOverAFlow(t *testing.T) {
	p := newTLSPair(t)
	credentials, err := newCredentials(p.client(), "")
	if err != nil {
		t.Fatal(err)
	}
	server, err := serverTLS(p.server())
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		n := newSlowNet(100e3/8, 4<<10)
		var all sync.WaitGroup
		content := bytes.Repeat([]byte("content "), 64*mempage.Size/8)
		all.Go(func() {
			nc, err := n.Dial(t.Context(), "")
			if err != nil {
				t.Error(err)
				return
			}
			c := newConn(nc)
			if err := credentials.handshake(t.Context(), c); err != nil {
				t.Error(err)
			}
			if err := c.writeFrame(header{typ: frameState}, content); err != nil {
				t.Error(err)
			}
			c.writeAlive(false)
			if sent, alive := c.flow.sent.Load(), c.flow.aliveOut.Load(); sent < uint64(len(content)) || alive <= headerSize || alive > 200 {
				t.Errorf("%d bytes sent, %d of them in an ALIVE", sent, alive)
			}
			nc.Close()
		})
		nc, err := n.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c := newConn(nc)
		if err := (&Receiver{tls: server, keyLimit: keyLimit}).handshake(c, readByte(t, c)); err != nil {
			t.Fatal(err)
		}
		h, err := c.readHeader()
		if err != nil {
			t.Fatal(err)
		}
		b, err := c.readPayload(h, maxState)
		if err != nil || !bytes.Equal(b, content) {
			t.Errorf("%d bytes, %v", len(b), err)
		}
		if h, err := c.readHeader(); err != nil || h.typ != frameAlive {
			t.Errorf("%v, %v", h.typ, err)
		}
		nc.Close()
		all.Wait()
		n.carriers.Wait()
	})
}

func readByte(t *testing.T, c *conn) byte {
	var b [1]byte
	if err := c.readFull(b[:]); err != nil {
		t.Fatal(err)
	}
	return b[0]
}

// What a kernel buffers has not moved; what the peer's kernel took has, and so has what
// came and nobody has read. Of ALIVE frames, nothing.
func TestWhatHasMoved(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			address := "127.0.0.1:0"
			if network == "unix" {
				address = t.TempDir() + "/s"
			}
			ln, err := net.Listen(network, address)
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			a, err := net.Dial(network, ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			b, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close()
			c, peer := newConn(a), newConn(b)
			defer c.Close()
			await := func(what string, is func() bool) {
				t.Helper()
				for deadline := time.Now().Add(patienceOfTests); !is(); time.Sleep(time.Millisecond) {
					if time.Now().After(deadline) {
						t.Fatal(what)
					}
				}
			}
			acknowledged := func() bool {
				n, ok := c.flow.queued()
				return ok && n == 0
			}
			here, there := c.flow.moved(), peer.flow.moved()
			full := make(chan error, 1)
			go func() { full <- c.writeFrame(header{typ: frameState}, make([]byte, 32<<20)) }()
			await("the write does not wait", c.flow.writes.under)
			if network == "tcp" { // of what nobody reads
				await("nothing has left", func() bool { return c.flow.moved() != here })
				await("nothing has come", func() bool { return peer.flow.moved() != there })
			}
			if h, err := peer.readHeader(); err != nil || h.typ != frameState {
				t.Fatal(h, err)
			}
			here = c.flow.moved()
			read := make(chan error, 1)
			go func() {
				_, err := peer.readPayload(header{length: 32 << 20}, 32<<20)
				read <- err
			}()
			await("nothing has left", func() bool { return c.flow.moved() != here })
			if err := errors.Join(<-full, <-read); err != nil {
				t.Fatal(err)
			}
			await("something is in the buffers", acknowledged)
			here = c.flow.moved()
			for range 100 {
				c.writeAlive(true)
			}
			if network == "tcp" {
				await("something is in the buffers", acknowledged)
			}
			if n := c.flow.moved(); n != here {
				t.Errorf("ALIVE counts for %d", n-here)
			}
			if c.flow.writes.under() || c.flow.reads.under() {
				t.Error("something waits")
			}
		})
	}
}
