package test

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/govmm/govmm/guest"
	"github.com/govmm/govmm/mempage"
)

// hostileNetwork is a guest at one host, a destination with TLS at another one, and an
// intruder between them.
type hostileNetwork struct {
	t        *testing.T
	a, b     *site
	x        *intruder
	ca       *authority
	src, dst *proc
	addr     string // of the destination
	alpha    string // --tls-dir of the source
	beta     string // and of the destination
}

func newHostileNetwork(t *testing.T) *hostileNetwork {
	needKVM(t)
	n := &hostileNetwork{t: t, ca: newAuthority(t)}
	n.a, n.b = newSites(t)
	n.x = newIntruder(t, n.a)
	n.alpha, n.beta = n.ca.host("alpha"), n.ca.host("beta", n.b.ip)
	n.src = n.a.startDemo("src", 1, 64, 32, 4)
	n.dst, n.addr = n.b.receiveAt("dst", n.b.ip+":0", "--tls-dir", n.beta, "--tls-allow", "alpha")
	return n
}

// fails expects that a migration to addr fails with one line that contains why, and that
// the guest goes on at the source.
func (n *hostileNetwork) fails(t *testing.T, addr, why string, more ...string) {
	t.Helper()
	r, exit := n.a.migrate(append([]string{"src", "--to", addr, "--tls-dir", n.alpha}, more...)...)
	if exit < 3 || r.Status != "failed" || !strings.Contains(r.Error, why) || strings.ContainsAny(r.Error, "\n\x1b") {
		t.Errorf("exit %d, %q; expected %q", exit, r.Error, why)
	}
	n.goesOn(t)
}

// goesOn expects that the guest runs at the source and nothing has arrived.
func (n *hostileNetwork) goesOn(t *testing.T) {
	t.Helper()
	n.src.out.awaitTick(t, n.src.out.len(), "that the guest goes on", func(tick) bool { return true })
	if s := n.b.info("dst").State; s != "receiving" || n.dst.out.len() != 0 {
		t.Errorf("the destination is %q, %q", s, n.dst.out.tail(3))
	}
}

// client is the configuration of somebody with the certificate of a directory.
func (n *hostileNetwork) client(dir string) *tls.Config {
	return &tls.Config{RootCAs: trusted(n.t, n.alpha), Certificates: []tls.Certificate{pair(n.t, dir)}, ServerName: "beta", NextProtos: []string{alpn}}
}

// plainHello is the hello of a migration, or of what else purpose says.
func plainHello(purpose byte, session string) []byte {
	b := make([]byte, 64)
	copy(b, "GOVMMLM\n\x03\x00\x03\x00")
	b[12] = purpose
	if purpose == 3 {
		b[14] = 1
	}
	copy(b[24:40], session)
	b[40] = 1
	return b
}

func rawFrame(typ byte, length uint32, first uint64, count uint32, payload ...byte) []byte {
	b := make([]byte, 24)
	b[0] = typ
	binary.LittleEndian.PutUint32(b[4:], length)
	binary.LittleEndian.PutUint64(b[8:], first)
	binary.LittleEndian.PutUint32(b[16:], count)
	return append(b, payload...)
}

// TestHostileNetwork: what those get who reach the network between two hosts. The guest
// goes on all the time, and moves in the end.
func TestHostileNetwork(t *testing.T) {
	n := newHostileNetwork(t)
	for _, attack := range []struct {
		name string
		f    func(*hostileNetwork, *testing.T)
	}{
		{"port scan", (*hostileNetwork).portScan},
		{"certificate of one's own", (*hostileNetwork).ownCertificate},
		{"changed bit", (*hostileNetwork).changedBit},
		{"stripped TLS", (*hostileNetwork).strippedTLS},
		{"another name", (*hostileNetwork).anotherName},
		{"malicious source", (*hostileNetwork).maliciousSource},
		{"malicious destination", (*hostileNetwork).maliciousDestination},
		{"replay", (*hostileNetwork).replay}, // moves the guest
	} {
		t.Run(attack.name, func(t *testing.T) { attack.f(n, t) })
	}
}

// A scan finds one open port, which says nothing to who says nothing, nothing to who speaks
// something else, and to who speaks plain that it takes TLS.
func (n *hostileNetwork) portScan(t *testing.T) {
	for p, want := range map[*proc]int{n.src: 0, n.dst: 1} {
		if got := listening(t, p); got != want {
			t.Errorf("%d ports are open, expected %d", got, want)
		}
	}
	noise, err := os.ReadFile(govmm)
	if err != nil {
		t.Fatal(err)
	}
	for name, say := range map[string]string{
		"nothing": "", "http": "GET / HTTP/1.1\r\nHost: a.example\r\nAccept: */*\r\n\r\n" + strings.Repeat(" ", 64),
		"ssh": "SSH-2.0-scan\r\n" + strings.Repeat(" ", 64), "a program": string(noise[:1<<20]), "part of a hello": "GOVMMLM\n",
	} {
		if got := n.x.gets(n.addr, nil, []byte(say)); len(got) != 0 {
			t.Errorf("%s gets %q", name, got)
		}
	}
	for _, purpose := range []byte{1, 2, 3, 4} {
		got := n.x.gets(n.addr, nil, plainHello(purpose, "a session"))
		if len(got) < 24 || got[0] != frameRefused || !bytes.Contains(got, []byte("takes guests by TLS only")) || len(got) > 200 {
			t.Errorf("a plain hello of purpose %d gets %q", purpose, got)
		}
	}
	stranger := &tls.Config{RootCAs: trusted(t, n.alpha), ServerName: "beta", NextProtos: []string{alpn}}
	if got := n.x.gets(n.addr, stranger, plainHello(1, "a session")); len(got) != 0 {
		t.Errorf("without a certificate one gets %q", got)
	}
	for range 300 { // which stay open
		idle := n.x.dial(n.addr)
		t.Cleanup(func() { idle.Close() })
		_, _ = idle.Write([]byte{22, 3, 1}) // the beginning of TLS
	}
	n.goesOn(t)
}

// listening is how many TCP ports are open in the network namespace of a process.
func listening(t *testing.T, p *proc) (ports int) {
	t.Helper()
	for _, file := range []string{"tcp", "tcp6"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", p.cmd.Process.Pid, file))
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range strings.Split(string(b), "\n") {
			if f := strings.Fields(line); len(f) > 3 && f[3] == "0A" { // TCP_LISTEN
				ports++
			}
		}
	}
	return ports
}

// serve answers each connection to the intruder, until the test ends, and returns where.
func (n *hostileNetwork) serve(t *testing.T, f func(net.Conn)) string {
	ln := n.x.listen()
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(patience))
				f(c)
			}()
		}
	}()
	return ln.Addr().String()
}

// Who ends TLS in the middle with a certificate of a CA of his own gets no hello.
func (n *hostileNetwork) ownCertificate(t *testing.T) {
	theirs := newAuthority(t)
	got := make(chan int, 1)
	addr := n.serve(t, func(c net.Conn) {
		k, _ := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{pair(t, theirs.host("beta"))}, NextProtos: []string{alpn}}).Read(make([]byte, 64))
		got <- k
	})
	n.fails(t, addr, "the destination's certificate is not accepted here: x509: certificate signed by unknown authority", "--tls-server-name", "beta")
	if k := <-got; k != 0 {
		t.Errorf("the man in the middle got %d bytes", k)
	}
}

// Who changes a bit on the way ends the migration, and changes nothing else.
func (n *hostileNetwork) changedBit(t *testing.T) {
	m := n.x.between(n.addr)
	m.change = func(at int64, p []byte) {
		const where = 4 << 20
		if at <= where && where < at+int64(len(p)) {
			p[where-at] ^= 0x10
		}
	}
	from := n.dst.err.len()
	n.fails(t, m.addr, "bad record MAC", "--tls-server-name", "beta")
	n.dst.err.awaitText(t, from, "bad record MAC")
}

// Who answers TLS in plain does not make the source speak plain.
func (n *hostileNetwork) strippedTLS(t *testing.T) {
	ok, err := cbor.Marshal(map[string]any{"version": 3, "channels": 1, "alive": 2000})
	if err != nil {
		t.Fatal(err)
	}
	for want, say := range map[string][]byte{
		"the destination does not speak TLS":    rawFrame(frameHelloOK, uint32(len(ok)), 0, 0, ok...),
		"the destination receives without TLS":  rawFrame(frameRefused, 0, 0, 0),
		"the destination closed the connection": nil,
	} {
		rest := make(chan []byte, 1)
		addr := n.serve(t, func(c net.Conn) {
			var hello [64]byte
			_, _ = io.ReadFull(c, hello[:])
			_, _ = c.Write(say)
			_ = c.(*net.TCPConn).CloseWrite()
			all, _ := io.ReadAll(c)
			rest <- append(hello[:], all...)
		})
		n.fails(t, addr, want, "--tls-server-name", "beta")
		if all := <-rest; bytes.Contains(all, []byte("GOVMMLM")) {
			t.Errorf("%s: the source said hello in plain", want)
		}
	}
}

// Who has a certificate of the same CA for another name is neither the destination nor one
// of the sources that may.
func (n *hostileNetwork) anotherName(t *testing.T) {
	gamma := n.ca.host("gamma")
	got := make(chan int, 1)
	addr := n.serve(t, func(c net.Conn) {
		server := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{pair(t, gamma)}, ClientAuth: tls.RequireAndVerifyClientCert,
			ClientCAs: trusted(t, gamma), NextProtos: []string{alpn}})
		k, _ := server.Read(make([]byte, 64))
		got <- k
	})
	n.fails(t, addr, "certificate is valid for gamma, not beta", "--tls-server-name", "beta")
	if k := <-got; k != 0 {
		t.Errorf("another destination got %d bytes", k)
	}
	from := n.dst.err.len()
	if said := n.x.gets(n.addr, n.client(gamma), plainHello(1, "a session")); len(said) != 0 {
		t.Errorf("another source is told %q", said)
	}
	n.dst.err.awaitText(t, from, "--tls-allow")
	n.goesOn(t)
}

// A host that may send guests, and was taken over, is refused what is no guest, learns
// nothing of the destination's files, and uses up nothing.
func (n *hostileNetwork) maliciousSource(t *testing.T) {
	config, err := cbor.Marshal(map[string]any{"features": []string{"renew-keys"}, "machine": []byte{1, 2, 3}})
	if err != nil {
		t.Fatal(err)
	}
	start := plainHello(1, "another session")
	for name, say := range map[string][]byte{
		"garbage":          bytes.Repeat([]byte{0xff}, 1<<20),
		"huge config":      append(bytes.Clone(start), rawFrame(frameConfig, math.MaxUint32, 0, 0)...),
		"bad config":       append(bytes.Clone(start), rawFrame(frameConfig, 3, 0, 0, 0xbf, 0xff, 0x00)...),
		"no machine":       append(bytes.Clone(start), rawFrame(frameConfig, uint32(len(config)), 0, 0, config...)...),
		"cut config":       append(bytes.Clone(start), rawFrame(frameConfig, 1<<28, 0, 0, 1, 2, 3)...),
		"pages by control": append(bytes.Clone(start), rawFrame(framePages, math.MaxUint32, 1<<63, 1024)...),
		"commit":           append(bytes.Clone(start), rawFrame(frameCommit, 0, 0, 0)...),
		"data of nobody":   plainHello(3, "another session"),
		"query of nobody":  plainHello(2, "another session"),
	} {
		got := n.x.gets(n.addr, n.client(n.alpha), say)
		if bytes.Contains(got, []byte(n.beta)) || bytes.Contains(got, []byte(n.b.dir)) || bytes.Contains(got, []byte("goroutine")) || len(got) > 4096 {
			t.Errorf("%s gets %q", name, got)
		}
	}
	n.goesOn(t)
}

// A host that has the destination's certificate, and lies, gets the guest's memory, as any
// destination does, but not the guest: that goes on where it is.
func (n *hostileNetwork) maliciousDestination(t *testing.T) {
	hello := func(channels int) []byte {
		ok, err := cbor.Marshal(map[string]any{"version": 3, "channels": channels, "alive": 2000, "features": []string{"renew-keys"}})
		if err != nil {
			t.Fatal(err)
		}
		return rawFrame(frameHelloOK, uint32(len(ok)), 0, 0, ok...)
	}
	text := func(key, s string) []byte {
		b, err := cbor.Marshal(map[string]any{key: s})
		if err != nil {
			t.Fatal(err)
		}
		return rawFrame(frameFailed, uint32(len(b)), 0, 0, b...)
	}
	ready := append(hello(1), rawFrame(frameReady, 0, 0, 0)...)
	for want, say := range map[string][]byte{
		"granted 65535 data connections":           hello(65535),
		"sent RUNNING instead of HELLO_OK":         rawFrame(frameRunning, 0, 0, 0),
		"sent RUNNING instead of READY":            append(hello(1), rawFrame(frameRunning, 0, 0, 0)...),
		"sent PREPARED instead of ROUND":           append(bytes.Clone(ready), rawFrame(framePrepared, 0, 1, 0)...),
		"confirmed round 7 instead of 0":           append(bytes.Clone(ready), rawFrame(frameRound, 0, 7, 0)...),
		"the destination gave up: it [31m is full": text("reason", "it\x1b[31m is full"),
		"HELLO_OK of 4294967295 bytes":             rawFrame(frameHelloOK, math.MaxUint32, 0, 0),
		"destination lost":                         nil,
	} {
		config := &tls.Config{Certificates: []tls.Certificate{pair(t, n.beta)}, ClientAuth: tls.RequireAndVerifyClientCert,
			ClientCAs: trusted(t, n.beta), NextProtos: []string{alpn}}
		addr := n.serve(t, func(raw net.Conn) {
			c := tls.Server(raw, config)
			var said [64]byte
			if _, err := io.ReadFull(c, said[:]); err != nil {
				return
			}
			if said[12] == 1 {
				_, _ = c.Write(say)
				if say == nil {
					return
				}
			}
			_, _ = io.Copy(io.Discard, c) // pages too
		})
		n.fails(t, addr, want, "--tls-server-name", "beta", "--channels", "1")
	}
}

// Who records a migration reads nothing of the guest, and can do nothing with it: not to
// the destination that has the guest, and not to another one with the same certificate.
// Of a plain migration he reads all.
func (n *hostileNetwork) replay(t *testing.T) {
	secret := guest.ELF[len(guest.ELF)/2:][:64] // CONFIG has the kernel
	m := n.x.between(n.addr)
	r, exit := n.a.migrate("src", "--to", m.addr, "--tls-dir", n.alpha, "--tls-server-name", "beta")
	if exit != 0 {
		t.Fatalf("exit %d, %+v", exit, r)
	}
	awaitVerified(t, n.dst.out, 0, 32*mib/mempage.Size)
	if m.saw(secret) {
		t.Error("part of the guest's kernel can be read")
	}
	second, addr := n.b.receiveAt("second", n.b.ip+":0", "--tls-dir", n.beta, "--tls-allow", "alpha")
	said := m.recorded()
	if len(said) < 2 {
		t.Fatalf("%d connections are recorded", len(said))
	}
	for _, conn := range said {
		_ = n.x.gets(n.addr, nil, conn) // a handshake that it cannot go on with
		_ = n.x.gets(addr, nil, conn)
	}
	second.err.awaitText(t, 0, "bad record MAC")
	if s := n.b.info("second").State; s != "receiving" || second.out.len() != 0 {
		t.Errorf("the second destination is %q", s)
	}
	// The same without TLS, so that it is known what there is to be read.
	_, addr = n.b.receiveAt("plain", n.b.ip+":0", "--insecure")
	n.a.startDemo("open", 1, 64, 16, 4)
	m = n.x.between(addr)
	if r, exit := n.a.migrate("open", "--to", m.addr); exit != 0 {
		t.Fatalf("exit %d, %+v", exit, r)
	}
	if !m.saw(secret) {
		t.Error("the guest's kernel is not in a plain migration: this test looks for the wrong thing")
	}
}
