package test

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate/hosttls"
)

// authority signs certificates of hosts, as govmm certs does.
type authority struct {
	t   testing.TB
	dir string
	ca  *hosttls.CA
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir()}
	err := hosttls.CreateCA(a.dir, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	if err == nil {
		a.ca, err = hosttls.OpenCA(a.dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// host returns a new --tls-dir of a host with these names.
func (a *authority) host(names ...string) string {
	a.t.Helper()
	return a.until(time.Now().Add(time.Hour), names...)
}

func (a *authority) until(end time.Time, names ...string) string {
	a.t.Helper()
	dir := filepath.Join(a.t.TempDir(), "tls")
	if err := a.ca.Issue(dir, names, time.Now().Add(-time.Hour), end); err != nil {
		a.t.Fatal(err)
	}
	return dir
}

// pair is the certificate and key of a --tls-dir.
func pair(t testing.TB, dir string) tls.Certificate {
	t.Helper()
	c, err := tls.LoadX509KeyPair(filepath.Join(dir, hosttls.CertFile), filepath.Join(dir, hosttls.KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// trusted are the authorities of a --tls-dir.
func trusted(t testing.TB, dir string) *x509.CertPool {
	t.Helper()
	pool := x509.NewCertPool()
	if b, err := os.ReadFile(filepath.Join(dir, hosttls.CAFile)); err != nil || !pool.AppendCertsFromPEM(b) {
		t.Fatalf("%s: %v", dir, err)
	}
	return pool
}

// alpn is what a govmm names as its protocol.
const alpn = "govmm-migrate"

// TestTLSBetweenHosts: with certificates that govmm certs has made a guest moves between
// two hosts, there and back, while it writes; each lets only the other one send.
func TestTLSBetweenHosts(t *testing.T) {
	needKVM(t)
	a, b := newSites(t)
	dir := t.TempDir()
	a.must("certs", "init", filepath.Join(dir, "ca"))
	a.must("certs", "issue", filepath.Join(dir, "ca"), "alpha,"+a.ip, "beta,"+b.ip)
	tlsDir := map[*site]string{a: filepath.Join(dir, "ca", "alpha"), b: filepath.Join(dir, "ca", "beta")}
	const owned = 64 * mib / mempage.Size
	here := a.startDemo("t0", 2, 128, 64, 8)
	from, to := a, b
	for i, name := range []string{"t1", "t2"} {
		there, addr := to.receiveAt(name, to.ip+":0", "--tls-dir", tlsDir[to], "--tls-allow", from.ip)
		args := []string{[]string{"t0", "t1"}[i], "--to", addr, "--tls-dir", tlsDir[from]}
		if said := from.must(append(append([]string{"migrate"}, args...), "--estimate")...); !strings.Contains(said, "the link carries") {
			t.Errorf("the estimate: %q", said)
		}
		r, exit := from.migrate(append(args, "--verify-pages", "--channels", "3")...)
		if exit != 0 || r.Status != "completed" || here.wait() != 0 {
			t.Fatalf("migration %d: exit %d, %+v", i, exit, r)
		}
		awaitVerified(t, there.out, 0, owned)
		here, from, to = there, to, from
	}
}

// TestTLSRefusals: whatever does not fit between two hosts is one clear line at each of
// them, and the guest goes on.
func TestTLSRefusals(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	ours, theirs := newAuthority(t), newAuthority(t)
	src := h.startDemo("src", 1, 64, 16, 4)
	at := src.out.len()
	beta, alpha, gamma, strange := ours.host("beta", "127.0.0.1"), ours.host("alpha"), ours.host("gamma"), theirs.host("alpha")
	// One that trusts the destination, and has a certificate that the destination does not trust.
	half := theirs.host("alpha")
	ca, err := os.ReadFile(filepath.Join(alpha, hosttls.CAFile))
	if err != nil {
		t.Fatal(err)
	}
	appendTo(t, filepath.Join(half, hosttls.CAFile), ca)
	receive := func(name string, secure bool) (*proc, string) {
		if !secure {
			return h.receive(name)
		}
		return h.receive(name, "--tls-dir", beta, "--tls-allow", "alpha", "--tls-allow", "*.example")
	}
	for name, tc := range map[string]struct {
		secure bool
		dir    string
		more   []string
		here   string // of the error at the source
		there  string // of a line at the destination
	}{
		"plain-to-tls":   {true, "", nil, "by TLS only", "by TLS only"},
		"tls-to-plain":   {false, alpha, nil, "receives without TLS", "receives without TLS"},
		"wrong-name":     {true, alpha, []string{"--tls-server-name", "delta"}, "not delta", "does not accept this host's certificate"},
		"unknown":        {true, strange, nil, "unknown authority", "does not accept this host's certificate"},
		"unknown-source": {true, half, nil, "does not accept this host's certificate", "unknown authority"},
		"not-allowed":    {true, gamma, nil, "does not accept this host's certificate", "that of gamma: --tls-allow"},
	} {
		t.Run(name, func(t *testing.T) {
			dst, addr := receive(name, tc.secure)
			args := append([]string{"src", "--to", addr}, tc.more...)
			if tc.dir != "" {
				args = append(args, "--tls-dir", tc.dir)
			}
			r, exit := h.migrate(args...)
			if exit < 3 || r.Status != "failed" || !strings.Contains(r.Error, tc.here) || strings.Contains(r.Error, "\n") {
				t.Errorf("exit %d, %q; expected %q", exit, r.Error, tc.here)
			}
			dst.err.awaitText(t, 0, tc.there)
			h.awaitInfo("src", "guest that goes on", func(i info) bool { return i.State == "running" })
			_, errs, exit := h.run(append([]string{"migrate", "--estimate"}, args...)...)
			if exit != 1 || !strings.Contains(errs, tc.here) || strings.Count(errs, "\n") != 1 {
				t.Errorf("--estimate: exit %d, %q", exit, errs)
			}
			dst.kill(syscall.SIGTERM)
			if dst.wait() != 0 || dst.err.len() > 4 {
				t.Errorf("exit %d, more than a line for a refusal: %s", dst.exit, dst.err.tail(10))
			}
		})
	}
	secure, addr := receive("secure", true)
	// What the files say before a peer is asked.
	expired := ours.until(time.Now().Add(-time.Minute), "alpha", "127.0.0.1")
	if r, exit := h.migrate("src", "--to", addr, "--tls-dir", expired); exit != 1 || !strings.Contains(r.Error, "cert.pem: the certificate of") || !strings.Contains(r.Error, "has expired on") {
		t.Errorf("expired at the source: exit %d, %q", exit, r.Error)
	}
	if _, errs, exit := h.run("receive", "--listen", "127.0.0.1:0", "--tls-dir", expired); exit != 1 || !strings.Contains(errs, "has expired on") || strings.Count(errs, "\n") != 1 {
		t.Errorf("expired at the destination: exit %d, %q", exit, errs)
	}
	// Certificates that have expired since.
	from := secure.err.len()
	c, err := tls.Dial("tcp", addr, &tls.Config{Certificates: []tls.Certificate{pair(t, expired)}, RootCAs: trusted(t, alpha), NextProtos: []string{alpn}})
	if err == nil {
		_, err = c.Read(make([]byte, 1))
		c.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "expired certificate") {
		t.Errorf("an expired source: %v", err)
	}
	secure.err.awaitText(t, from, "has expired")
	r, exit := h.migrate("src", "--to", expiredServer(t, expired), "--tls-dir", alpha)
	if exit < 3 || !strings.Contains(r.Error, "has expired") {
		t.Errorf("an expired destination: exit %d, %q", exit, r.Error)
	}
	src.out.awaitTick(t, at, "after all that", func(tick) bool { return true })
	if r, exit := h.migrate("src", "--to", addr, "--tls-dir", alpha, "--tls-server-name", "beta"); exit != 0 {
		t.Fatalf("the migration that is right: %+v", r)
	}
	awaitVerified(t, secure.out, 0, 16*mib/mempage.Size)
}

func appendTo(t testing.TB, path string, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
}

// expiredServer is the address of a destination whose certificate has expired.
func expiredServer(t testing.TB, dir string) string {
	t.Helper()
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{pair(t, dir)}, NextProtos: []string{alpn}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, c) // until the source closes it
			c.Close()
		}
	}()
	return ln.Addr().String()
}

// TestTLSRotation: a receiver that waits uses certificates, and the authority, as soon as
// they are changed.
func TestTLSRotation(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	old, next := newAuthority(t), newAuthority(t)
	h.startDemo("src", 1, 64, 16, 4)
	beta := old.host("beta", "127.0.0.1")
	dst, addr := h.receive("dst", "--tls-dir", beta)
	oldAlpha, nextAlpha := old.host("alpha"), next.host("alpha")
	copyFiles(t, beta, next.host("beta", "127.0.0.1"))
	// This one trusts both authorities, and is of the old one.
	ca, err := os.ReadFile(filepath.Join(nextAlpha, hosttls.CAFile))
	if err != nil {
		t.Fatal(err)
	}
	appendTo(t, filepath.Join(oldAlpha, hosttls.CAFile), ca)
	r, exit := h.migrate("src", "--to", addr, "--tls-dir", oldAlpha)
	if exit < 3 || !strings.Contains(r.Error, "does not accept this host's certificate") {
		t.Errorf("a source of the old authority: exit %d, %q", exit, r.Error)
	}
	dst.err.awaitText(t, 0, "changed are in use")
	dst.err.awaitText(t, 0, "unknown authority")
	if err := os.Truncate(filepath.Join(beta, hosttls.KeyFile), 10); err != nil {
		t.Fatal(err)
	}
	if r, exit := h.migrate("src", "--to", addr, "--tls-dir", nextAlpha); exit != 0 {
		t.Fatalf("a source of the new authority: %+v", r)
	}
	dst.err.awaitText(t, 0, "are not used")
	awaitVerified(t, dst.out, 0, 16*mib/mempage.Size)
}

// copyFiles puts the three files of one directory over those of another one.
func copyFiles(t testing.TB, dir, from string) {
	t.Helper()
	for _, name := range []string{hosttls.CAFile, hosttls.CertFile, hosttls.KeyFile} {
		b, err := os.ReadFile(filepath.Join(from, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestListenPolicy: without TLS a receiver listens on addresses that only this host
// reaches, unless it is told otherwise, and says how.
func TestListenPolicy(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	dir := newAuthority(t).host("beta")
	for _, tc := range []struct {
		args string
		ok   bool
	}{
		{"0.0.0.0:0", false},
		{":0", false},
		{"[::]:0", false},
		{"0.0.0.0:0 --insecure", true},
		{"0.0.0.0:0 --tls-dir " + dir, true},
		{"127.0.0.2:0", true},
		{"localhost:0", true},
	} {
		args := append([]string{"receive", "--listen"}, strings.Fields(tc.args)...)
		if !tc.ok {
			_, errs, exit := h.run(args...)
			if exit != 2 || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, "--tls-dir DIR, a loopback address or unix:PATH, or --insecure") {
				t.Errorf("%s: exit %d, %q", tc.args, exit, errs)
			}
			continue
		}
		p := h.start(args...)
		at := p.err.awaitText(t, 0, "listening on ")
		if warned := strings.Contains(strings.Join(p.err.snapshot()[:at], "\n"), "whoever reaches"); warned != strings.Contains(tc.args, "--insecure") {
			t.Errorf("%s: %s", tc.args, p.err.tail(5))
		}
	}
	for _, args := range []string{
		"receive --listen :0 --insecure --tls-dir " + dir, "receive --listen 127.0.0.1:0 --tls-allow a", "receive --listen 127.0.0.1:0 --tls-dir x --tls-allow a_*",
		"migrate --to h:1 --tls-server-name x", "migrate --to unix:/x --tls-dir x", "migrate --to h:1 --tls-dir x --tls-server-name a/b",
	} {
		if _, errs, exit := h.run(strings.Fields(args)...); exit != 2 || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, "--tls-") && !strings.Contains(errs, "server name") {
			t.Errorf("%s: exit %d, %q", args, exit, errs)
		}
	}
}

// TestTLSPortIsScanned: what is no TLS, or no migration, costs a receiver with TLS a line.
func TestTLSPortIsScanned(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	ours := newAuthority(t)
	beta, alpha := ours.host("beta", "127.0.0.1"), ours.host("alpha")
	as := func(config *tls.Config) func(string) error {
		config.RootCAs = trusted(t, alpha)
		return func(addr string) error {
			c, err := tls.Dial("tcp", addr, config)
			if err != nil {
				return err
			}
			defer c.Close()
			_ = c.SetReadDeadline(time.Now().Add(patience))
			_, err = c.Read(make([]byte, 1))
			return err
		}
	}
	var addr string
	for name, scan := range map[string]func(addr string) error{
		"no-certificate": as(&tls.Config{NextProtos: []string{alpn}}),
		"tls-1.2":        as(&tls.Config{NextProtos: []string{alpn}, MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair(t, alpha)}}),
		"another-use":    as(&tls.Config{NextProtos: []string{"h2"}, Certificates: []tls.Certificate{pair(t, alpha)}}),
		"half-a-record": func(addr string) error {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				return err
			}
			defer c.Close()
			_, _ = c.Write([]byte{22, 3, 1, 0xff, 0xff, 1, 2, 3}) // it may be cut off
			_ = c.(*net.TCPConn).CloseWrite()
			_ = c.SetReadDeadline(time.Now().Add(patience))
			if b, _ := io.ReadAll(c); len(b) > 100 {
				return nil
			}
			return io.EOF
		},
	} {
		var dst *proc
		dst, addr = h.receive(name, "--tls-dir", beta) // its log may have one line of a kind in a while
		if err := scan(addr); err == nil {
			t.Errorf("%s: something came", name)
		}
		dst.err.awaitText(t, 0, "connection refused")
	}
	h.startDemo("src", 1, 64, 16, 4)
	if r, exit := h.migrate("src", "--to", addr, "--tls-dir", alpha); exit != 0 { // the last one has got over it
		t.Fatalf("%+v", r)
	}
}
