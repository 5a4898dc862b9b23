package migrate

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/govmm/govmm/internal/testcert"
	"github.com/govmm/govmm/mempage"
)

// tlsPair are the certificates of a source and a destination, by one CA.
type tlsPair struct {
	ca                  *testcert.CA
	source, destination tls.Certificate
}

func newTLSPair(t *testing.T) tlsPair {
	ca := testcert.NewCA(t, "the CA")
	return tlsPair{ca, ca.Issue(t, "source"), ca.Issue(t, "destination")}
}

func (p tlsPair) client() *tls.Config { return p.ca.Client(p.source, "destination") }

func (p tlsPair) server() *tls.Config { return p.ca.Server(p.destination) }

// secure makes the receiver of a bubble one with TLS, before anybody connects.
func (b *bubble) secure(p tlsPair) {
	b.t.Helper()
	if err := b.recv.RequireTLS(p.server()); err != nil {
		b.t.Fatal(err)
	}
}

// connect makes a connection as the engine does.
func (b *bubble) connect(h hello, config *tls.Config) *conn {
	b.t.Helper()
	c, err := newDialer("", Options{Dial: b.net.Dial, TLS: config}.withDefaults()).connect(context.Background(), h)
	if err != nil {
		b.t.Fatal(err)
	}
	b.opened = append(b.opened, c)
	return c
}

// What each side says when the two do not agree about TLS: one line that says what is
// wrong, at both ends.
func TestTLSMismatches(t *testing.T) {
	p, other := newTLSPair(t), testcert.NewCA(t, "another CA")
	expired := p
	expired.source, expired.destination = p.ca.Expired(t, "source"), p.ca.Expired(t, "destination")
	alien := tlsPair{p.ca, other.Issue(t, "source"), other.Issue(t, "destination")}
	picky := p.server()
	picky.VerifyConnection = func(tls.ConnectionState) error { return errors.New("the name source is not allowed here") }
	const refuses = "refused by the destination: it does not accept this host's certificate: "
	for _, c := range []struct {
		name                string
		client, server      *tls.Config
		source, destination string // what their lines contain
	}{
		{"plain source", nil, p.server(), "refused by the destination: this host takes guests by TLS only", "this host takes guests by TLS only"},
		{"plain destination", p.client(), nil, "the destination receives without TLS", "this host receives without TLS"},
		{"expired source", expired.client(), p.server(), refuses + "expired certificate", "the source's certificate is not accepted here: x509: certificate has expired"},
		{"expired destination", p.client(), expired.server(), "the destination's certificate is not accepted here: x509: certificate has expired", "the source does not accept this host's certificate: bad certificate"},
		{"unknown source", alien.client(), p.server(), refuses + "unknown certificate authority", "the source's certificate is not accepted here: x509: certificate signed by unknown authority"},
		{"unknown destination", p.client(), alien.server(), "the destination's certificate is not accepted here: x509: certificate signed by unknown authority", "the source does not accept this host's certificate: bad certificate"},
		{"wrong name", p.ca.Client(p.source, "elsewhere"), p.server(), "the destination's certificate is not accepted here: x509: certificate is valid for destination, not elsewhere", "the source does not accept this host's certificate: bad certificate"},
		{"name that may not", p.client(), picky, refuses + "bad certificate", "the name source is not allowed here"},
		{"certificate of a server only", p.ca.Client(serverOnly(t, p.ca), "destination"), p.server(), refuses + "bad certificate", "incompatible key usage"},
		{"old TLS", p.client(), oldTLS(p), "the destination ended TLS: protocol version not supported", "TLS handshake"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newSlowNet(1e9, 64<<10)
				ln := net.Listener(n)
				if c.server != nil {
					ln = tlsListener{n, c.server}
				}
				_, line, err := migrateOver(t, n, ln, false, nil, Options{Dial: n.Dial, TLS: c.client, PeerTimeout: time.Second})
				if err == nil || !strings.Contains(err.Error(), c.source) || strings.Contains(err.Error(), "\n") {
					t.Errorf("the source says %v\nexpected %s", err, c.source)
				}
				if !strings.Contains(line, c.destination) {
					t.Errorf("the destination says %s\nexpected %s", line, c.destination)
				}
			})
		})
	}
}

// serverOnly is a certificate that is none for clients.
func serverOnly(t *testing.T, ca *testcert.CA) tls.Certificate {
	return ca.IssueUsage(t, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, "source")
}

// oldTLS is a server that the engine would never make: it is played by crypto/tls alone.
func oldTLS(p tlsPair) *tls.Config {
	c := p.server()
	c.MaxVersion = tls.VersionTLS12
	return c
}

// A configuration that would not demand certificates of both sides, of a CA of one's own,
// is refused before anything is done.
func TestTLSConfigurationsThatDemandTooLittle(t *testing.T) {
	p := newTLSPair(t)
	change := func(c *tls.Config, f func(*tls.Config)) *tls.Config {
		f(c)
		return c
	}
	for want, c := range map[string]*tls.Config{
		"must verify the destination's certificate": change(p.client(), func(c *tls.Config) { c.InsecureSkipVerify = true }),
		"must name the CA of the destination":       change(p.client(), func(c *tls.Config) { c.RootCAs = nil }),
		"must have a certificate":                   change(p.client(), func(c *tls.Config) { c.Certificates = nil }),
		"must allow TLS 1.3":                        change(p.client(), func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }),
	} {
		if err := (Options{TLS: c}).Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v instead of %s", err, want)
		}
	}
	if _, err := New(newToySource(t, &whoRuns{t: t, who: map[string]bool{}}), "unix:/nowhere", Options{TLS: p.ca.Client(p.source, "")}).Run(t.Context()); err == nil ||
		!strings.Contains(err.Error(), "ServerName") {
		t.Errorf("%v: a name is needed", err)
	}
	for want, c := range map[string]*tls.Config{
		"must require and verify":         change(p.server(), func(c *tls.Config) { c.ClientAuth = tls.VerifyClientCertIfGiven }),
		"must name the CA of the sources": change(p.server(), func(c *tls.Config) { c.ClientCAs = nil }),
		"must have a certificate":         change(p.server(), func(c *tls.Config) { c.Certificates = nil }),
		"must allow TLS 1.3":              oldTLS(p),
	} {
		if err := new(Receiver).RequireTLS(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v instead of %s", err, want)
		}
		// One that a callback returns is found out at the handshake.
		outer, err := serverTLS(&tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return c, nil }})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := outer.GetConfigForClient(nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("by a callback: %v instead of %s", err, want)
		}
	}
	if outer, err := serverTLS(&tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return nil, nil }}); err != nil {
		t.Error(err)
	} else if _, err := outer.GetConfigForClient(nil); err == nil {
		t.Error("a callback that returns nothing is as good as a configuration")
	}
}

// A server that does not ask for a certificate does not know who hands over a guest.
func TestTheDestinationMustAskForACertificate(t *testing.T) {
	p := newTLSPair(t)
	a, b := net.Pipe()
	var served sync.WaitGroup
	served.Go(func() {
		server := tls.Server(b, &tls.Config{Certificates: []tls.Certificate{p.destination}, NextProtos: []string{alpn}})
		_ = server.Handshake()
		b.Close()
	})
	k, err := newCredentials(p.client(), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := k.handshake(t.Context(), newConn(a)); err == nil || !strings.Contains(err.Error(), "did not ask for this host's certificate") {
		t.Error(err)
	}
	a.Close()
	served.Wait()
}

// A data channel, a query, and a migration that takes the place of another one must come
// from the peer that has the session: the nonce alone is not enough. One whose certificate
// was renewed for its key is the same peer.
func TestASessionBelongsToACertificate(t *testing.T) {
	p := newTLSPair(t)
	thief := p.ca.Client(p.ca.Issue(t, "source"), "destination")
	renewed := p.ca.Client(p.ca.Renew(t, p.source, "source"), "destination")
	inBubble(t, func(b *bubble) {
		b.secure(p)
		refused := func(c *conn, why string) {
			t.Helper()
			h, err := c.readHeader()
			if err != nil || h.typ != frameRefused {
				t.Fatal(h.typ, err)
			}
			var r refused
			if err := c.readControl(h, &r); err != nil || !strings.Contains(strings.Join(r.Reasons, "; "), why) {
				t.Errorf("%q, %v", r.Reasons, err)
			}
		}
		h := newHello(purposeMigrate, sessionID{1})
		h.dataChannels = 1
		control := b.connect(h, p.client())
		b.write(control, new(stream).config("config"))
		b.expect(control, frameHelloOK)
		refused(b.connect(dataHello(1, 1), thief), errOtherPeer.Error())
		data := b.connect(dataHello(1, 1), renewed)
		b.expect(control, frameReady)

		refused(b.connect(newHello(purposeQuery, sessionID{1}), thief), errOtherPeer.Error())
		next := newHello(purposeMigrate, sessionID{2})
		next.previous = sessionID{1}
		refused(b.connect(next, thief), "another migration to this destination is under way")

		b.write(data, new(stream).frame(round(0, flagLast), nil))
		b.write(control, new(stream).frame(header{typ: frameState}, []byte("state")))
		b.expect(control, framePrepared)
		b.write(control, new(stream).frame(header{typ: frameCommit}, nil))
		b.expect(control, frameRunning)
		control.Close()
		synctest.Wait()
		refused(b.connect(newHello(purposeQuery, sessionID{1}), thief), errOtherPeer.Error())
		query := b.connect(newHello(purposeQuery, sessionID{1}), renewed)
		b.expect(query, frameVerdict)
		b.runs.set("destination", false)
	})
}

// Who can connect and shows no certificate, or says nothing, takes a newcomer's place and
// leaves it: a source gets through.
func TestStrangersOverTLS(t *testing.T) {
	p := newTLSPair(t)
	inBubble(t, func(b *bubble) {
		b.secure(p)
		var strangers []net.Conn
		for i := range 2 * maxNewcomers {
			c := b.dial()
			strangers = append(strangers, c)
			switch i % 3 {
			case 0: // the beginning of a ClientHello that announces much
				b.write(c, &stream{*bytes.NewBuffer([]byte{tlsFirstByte, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff})})
			case 1:
				b.write(c, &stream{*bytes.NewBuffer([]byte{tlsFirstByte})})
			}
		}
		if _, err := New(newToySource(b.t, b.runs), "", Options{Dial: b.net.Dial, TLS: p.client()}).Run(context.Background()); err != nil {
			t.Error(err)
		}
		b.recv.newcomers.mu.Lock()
		n := len(b.recv.newcomers.conns)
		b.recv.newcomers.mu.Unlock()
		if n > maxNewcomers {
			t.Errorf("%d newcomers", n)
		}
		for _, c := range strangers {
			c.Close()
		}
	})
}

// What an ALIVE takes on the wire is no progress, over TLS as without it: otherwise a
// session that is stuck would never be found out.
func TestAliveOverTLSIsNoProgress(t *testing.T) {
	p := newTLSPair(t)
	inBubble(t, func(b *bubble) {
		b.secure(p)
		h := newHello(purposeMigrate, sessionID{1})
		h.dataChannels = 1
		control := b.connect(h, p.client())
		b.expect(control, frameHelloOK)
		b.write(control, new(stream).config("config"))
		b.connect(dataHello(1, 1), p.client())
		b.expect(control, frameReady)
		synctest.Wait()
		before := b.recv.Progress().BytesReceived
		for range 10 {
			control.writeAlive(false)
		}
		synctest.Wait()
		if now := b.recv.Progress().BytesReceived; now != before {
			t.Errorf("ten ALIVE count for %d bytes", now-before)
		}
	})
}

// A migration over TLS, of a busy guest whose last pages come in runs of all lengths.
func TestMigrationOverTLS(t *testing.T) {
	p := newTLSPair(t)
	for _, channels := range []int{1, 3} {
		synctest.Test(t, func(t *testing.T) {
			n := newSlowNet(1e9, 64<<10)
			r, line, err := migrateOver(t, n, tlsListener{n, p.server()}, true, nil, Options{Dial: n.Dial, TLS: p.client(), VerifyPages: true, Channels: channels})
			if err != nil {
				t.Fatalf("%v; %s", err, line)
			}
			if data := r.BytesSent; data < 70*mempage.Size {
				t.Errorf("%d bytes on the wire", data)
			}
		})
	}
}

// A connection that follows on another one is only for the peer that has the session, one
// at a time, and RENEW without one ends the migration.
func TestRenewalsOfStrangers(t *testing.T) {
	p := newTLSPair(t)
	thief := p.ca.Client(p.ca.Issue(t, "source"), "destination")
	next := dataHello(1, 1)
	next.renews = true
	open := func(b *bubble, features ...string) (control, data *conn) {
		b.secure(p)
		h := newHello(purposeMigrate, sessionID{1})
		h.dataChannels = 1
		control = b.connect(h, p.client())
		b.write(control, new(stream).config("config", features...))
		b.expect(control, frameHelloOK)
		b.expect(b.connect(next, p.client()), frameRefused) // of a channel that is not there
		data = b.connect(dataHello(1, 1), p.client())
		b.expect(control, frameReady)
		return control, data
	}
	renew := new(stream).frame(header{typ: frameRenew}, nil)
	inBubble(t, func(b *bubble) {
		control, data := open(b, featureRenew)
		b.expect(b.connect(next, thief), frameRefused)
		second := b.connect(next, p.client())
		synctest.Wait()
		b.expect(b.connect(next, p.client()), frameRefused) // a third one
		b.write(data, new(stream).frame(round(0, 0), nil).frame(header{typ: frameRenew}, nil))
		b.expect(control, frameRound)
		b.write(second, new(stream).frame(round(1, 0), nil))
		b.expect(control, frameRound)
		b.write(second, renew)
		if h, err := b.read(control); err != nil || h.typ != frameFailed {
			t.Errorf("%v, %v: no connection follows", h.typ, err)
		}
		if line := <-b.lines; !strings.Contains(line, "refused") {
			t.Errorf("the destination says %s", line)
		}
	})
	inBubble(t, func(b *bubble) {
		control, data := open(b)
		b.write(data, renew)
		if h, err := b.read(control); err != nil || h.typ != frameFailed {
			t.Errorf("%v, %v: CONFIG does not name it", h.typ, err)
		}
	})
}
