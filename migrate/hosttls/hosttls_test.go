package hosttls

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/boundedlog"
	"golang.org/x/sys/unix"
)

// newCA makes an authority in a directory of the test.
func newCA(t testing.TB) *CA {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "ca")
	check(t, CreateCA(dir, time.Now().Add(-time.Hour), time.Now().Add(time.Hour)))
	ca, err := OpenCA(dir)
	check(t, err)
	return ca
}

// host issues a certificate, and returns its directory.
func (ca *CA) host(t testing.TB, names ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "host")
	check(t, ca.Issue(dir, names, time.Now().Add(-time.Hour), time.Now().Add(time.Hour)))
	return dir
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// client is the configuration of a source with the files of dir.
func client(t testing.TB, dir, serverName string) *tls.Config {
	t.Helper()
	c, err := ReadDir(dir)
	check(t, err)
	config, err := c.Client(serverName)
	check(t, err)
	return config
}

// handshake returns what both sides say of a connection, once a byte has gone each way.
func handshake(t testing.TB, client, server *tls.Config) (atClient, atServer error) {
	t.Helper()
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	end := func(fd int) net.Conn {
		f := os.NewFile(uintptr(fd), "")
		defer f.Close()
		c, err := net.FileConn(f)
		check(t, err)
		return c
	}
	a, b := end(ends[0]), end(ends[1])
	limit := time.Now().Add(time.Minute)
	_, _ = a.SetDeadline(limit), b.SetDeadline(limit)
	talk := func(c *tls.Conn) error {
		defer func() { _ = c.NetConn().Close() }()
		if err := c.Handshake(); err != nil {
			return err
		}
		if v := c.ConnectionState().Version; v != tls.VersionTLS13 {
			return errors.New(tls.VersionName(v))
		}
		var one [1]byte
		if _, err := c.Read(one[:]); err != nil {
			return err
		}
		_, err := c.Write(one[:])
		return err
	}
	var both sync.WaitGroup
	both.Go(func() { atServer = talk(tls.Server(b, server)) })
	both.Go(func() {
		c := tls.Client(a, client)
		defer func() { _ = a.Close() }()
		if atClient = c.Handshake(); atClient != nil {
			return
		}
		if _, atClient = c.Write([]byte{1}); atClient == nil {
			_, atClient = c.Read(make([]byte, 1))
		}
	})
	both.Wait()
	return atClient, atServer
}

func TestTwoHosts(t *testing.T) {
	ca := newCA(t)
	alpha, beta := ca.host(t, "alpha"), ca.host(t, "beta.example", "10.0.0.2", "fe80::2")
	s, err := NewServer(beta, nil, nil)
	check(t, err)
	for _, name := range []string{"beta.example", "BETA.example", "10.0.0.2", "fe80::2"} {
		if a, b := handshake(t, client(t, alpha, name), s.Config()); a != nil || b != nil {
			t.Errorf("%s: %v, %v", name, a, b)
		}
	}
	for _, name := range []string{"beta", "other", "10.0.0.3"} {
		if a, b := handshake(t, client(t, alpha, name), s.Config()); a == nil || b == nil || !strings.Contains(a.Error(), "beta.example") && !strings.Contains(a.Error(), "10.0.0.2") {
			t.Errorf("%s is taken for beta: %v, %v", name, a, b)
		}
	}
	old := client(t, alpha, "beta.example")
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	if a, b := handshake(t, old, s.Config()); a == nil || b == nil {
		t.Error("TLS 1.2 is spoken")
	}
	anonymous := client(t, alpha, "beta.example")
	anonymous.Certificates = nil
	if a, b := handshake(t, anonymous, s.Config()); a == nil || b == nil {
		t.Error("a peer without a certificate is taken")
	}
	stranger := client(t, newCA(t).host(t, "alpha"), "beta.example")
	stranger.RootCAs = client(t, alpha, "beta.example").RootCAs
	stranger.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { // also if the server names another authority
		return &stranger.Certificates[0], nil
	}
	if a, b := handshake(t, stranger, s.Config()); a == nil || b == nil || !strings.Contains(b.Error(), "unknown authority") {
		t.Errorf("another authority's certificate: %v, %v", a, b)
	}
}

// TestAllow: which certificates may hand over a guest.
func TestAllow(t *testing.T) {
	ca := newCA(t)
	beta := ca.host(t, "beta")
	for _, tc := range []struct {
		allow, names string
		ok           bool
	}{
		{"alpha", "alpha", true},
		{"ALPHA", "alpha", true},
		{"alpha", "Alpha", true},
		{"alpha", "gamma,alpha", true},
		{"alpha", "alphabet", false},
		{"alpha", "alpha.example", false},
		{"gamma,alpha", "alpha", true},
		{"*.example", "alpha.example", true},
		{"*.example", "a.alpha.example", false},
		{"*.example", "example", false},
		{"*.example", "alpha.example.org", false},
		{"10.0.0.1", "alpha,10.0.0.1", true},
		{"10.0.0.1", "10.0.0.2", false},
		{"10.0.0.0/24", "10.0.0.2", true},
		{"10.0.0.0/24", "10.0.1.2", false},
		{"fe80::/64", "fe80::1", true},
		{"10.0.0.0/24", "alpha", false},
	} {
		var allow []Pattern
		for s := range strings.SplitSeq(tc.allow, ",") {
			p, err := ParsePattern(s)
			check(t, err)
			allow = append(allow, p)
		}
		s, err := NewServer(beta, allow, nil)
		check(t, err)
		a, b := handshake(t, client(t, ca.host(t, strings.Split(tc.names, ",")...), "beta"), s.Config())
		if (a == nil && b == nil) != tc.ok {
			t.Errorf("--tls-allow %s and %s: %v, %v", tc.allow, tc.names, a, b)
		}
		if !tc.ok && !strings.Contains(b.Error(), "--tls-allow does not let it") {
			t.Errorf("%s: %v", tc.names, b)
		}
	}
	// Neither the common name nor a wildcard counts.
	alpha, err := ParsePattern("alpha")
	check(t, err)
	all, err := ParsePattern("*.example")
	check(t, err)
	odd := &x509.Certificate{Subject: pkix.Name{CommonName: "alpha"}, DNSNames: []string{"*.example"}}
	if alpha.allows(odd) || all.allows(odd) {
		t.Error("a common name or a wildcard is the name of a host")
	}
	for _, s := range []string{"", "*", "*.", "a b", "*.*.example", "a*.example", "10.0.0.300", "10.0.0.1/24", "fe80::1%eth0", "::ffff:10.0.0.0/120", "-a", "a..b", strings.Repeat("a.", 127) + "a"} {
		if p, err := ParsePattern(s); err == nil {
			t.Errorf("%q is the pattern %+v", s, p)
		} else if strings.Contains(err.Error(), "\n") || len(err.Error()) > 200 {
			t.Errorf("%q", err)
		}
	}
}

func TestServerName(t *testing.T) {
	for _, tc := range []struct{ address, override, want string }{
		{"alpha:7000", "", "alpha"},
		{"alpha.example.:7000", "", "alpha.example"},
		{"10.0.0.1:7000", "", "10.0.0.1"},
		{"[fe80::1%eth0]:7000", "", "fe80::1"},
		{"10.0.0.1:7000", "alpha", "alpha"},
		{"unix:/run/x.sock", "alpha", "alpha"},
		{"unix:/run/x:7", "", ""},
		{":7000", "", ""},
		{"alpha:7000", "a b", ""},
		{"alpha:7000", "*.example", ""},
		{"alpha:7000", "fe80::1%eth0", ""},
	} {
		got, err := ServerName(tc.address, tc.override)
		if (err == nil) != (tc.want != "") || err == nil && got != tc.want {
			t.Errorf("%s, %q: %q, %v", tc.address, tc.override, got, err)
		}
	}
}

// odd issues a certificate that Issue would not.
func (ca *CA) odd(t testing.TB, change func(*x509.Certificate)) (cert, key []byte) {
	t.Helper()
	c := &x509.Certificate{DNSNames: []string{"alpha"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	change(c)
	cert, key, err := sign(c, ca.cert, ca.key)
	check(t, err)
	return cert, key
}

// TestFaultsOfFiles: what is wrong with a directory is one line, before a peer is asked.
func TestFaultsOfFiles(t *testing.T) {
	ca := newCA(t)
	put := func(name string, data []byte, mode os.FileMode) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			check(t, os.Remove(filepath.Join(dir, name)))
			check(t, writeNew(filepath.Join(dir, name), data, mode))
			check(t, os.Chmod(filepath.Join(dir, name), mode))
		}
	}
	odd := func(change func(*x509.Certificate)) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			cert, key := ca.odd(t, change)
			put(CertFile, cert, 0o644)(t, dir)
			put(KeyFile, key, 0o600)(t, dir)
		}
	}
	good, err := ReadDir(ca.host(t, "alpha"))
	check(t, err)
	other, err := ReadDir(newCA(t).host(t, "alpha"))
	check(t, err)
	p384, err := x509.MarshalPKCS8PrivateKey(func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		check(t, err)
		return k
	}())
	check(t, err)
	for name, tc := range map[string]struct {
		change func(*testing.T, string)
		words  string
		client bool // a source takes it
	}{
		"no ca":        {func(t *testing.T, dir string) { check(t, os.Remove(filepath.Join(dir, CAFile))) }, "ca.pem is missing", false},
		"no cert":      {func(t *testing.T, dir string) { check(t, os.Remove(filepath.Join(dir, CertFile))) }, "cert.pem is missing", false},
		"no key":       {func(t *testing.T, dir string) { check(t, os.Remove(filepath.Join(dir, KeyFile))) }, "key.pem is missing", false},
		"no directory": {func(t *testing.T, dir string) { check(t, os.RemoveAll(dir)) }, "is missing", false},
		"a file":       {func(t *testing.T, dir string) { check(t, os.RemoveAll(dir)); check(t, os.WriteFile(dir, nil, 0o600)) }, "not a directory", false},
		"fifo": {func(t *testing.T, dir string) {
			check(t, os.Remove(filepath.Join(dir, CAFile)))
			check(t, unix.Mkfifo(filepath.Join(dir, CAFile), 0o600))
		}, "expected a file", false},
		"world's key":      {put(KeyFile, good.Key, 0o604), "chmod 600", false},
		"group writes key": {put(KeyFile, good.Key, 0o620), "chmod 600", false},
		"large":            {put(CertFile, bytes.Repeat([]byte("x"), MaxFile+1), 0o644), "at most", false},
		"empty":            {put(CAFile, nil, 0o644), "ca.pem: expected certificates", false},
		"text":             {put(CAFile, []byte("hello"), 0o644), "ca.pem: expected certificates", false},
		"cut off":          {put(CAFile, append(bytes.Clone(good.CA), good.CA[:100]...), 0o644), "cut off", false},
		"bad DER":          {put(CertFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1, 2, 3}}), 0o644), "cert.pem: ", false},
		"key as cert":      {put(CertFile, good.Key, 0o644), "found \"PRIVATE KEY\"", false},
		"key in ca":        {put(CAFile, append(bytes.Clone(good.CA), good.Key...), 0o644), "found \"PRIVATE KEY\"", false},
		"no CA":            {put(CAFile, good.Cert, 0o644), "is not one of an authority", false},
		"other key":        {put(KeyFile, other.Key, 0o600), "not that of cert.pem", false},
		"other curve":      {put(KeyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: p384}), 0o600), "key.pem: ", false},
		"cert as key":      {put(KeyFile, good.Cert, 0o600), "key.pem: ", false},
		"encrypted key":    {put(KeyFile, pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte{1}}), 0o600), "without a passphrase", false},
		"other CA":         {put(CAFile, other.CA, 0o644), "no authority of ca.pem has signed it", false},
		"expired":          {odd(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), "has expired on 2", false},
		"not yet":          {odd(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), "is valid from", false},
		"no host":          {odd(func(c *x509.Certificate) { c.DNSNames, c.Subject.CommonName = nil, "alpha" }), "names no host", true},
		"client only":      {odd(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), "by a TLS server", true},
		"neither":          {odd(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }), "by a TLS ", false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := ca.host(t, "alpha")
			tc.change(t, dir)
			_, atServer := NewServer(dir, nil, nil)
			c, atClient := ReadDir(dir)
			if atClient == nil {
				_, atClient = c.Client("alpha")
			}
			if tc.client && atClient != nil {
				t.Errorf("refused at a source: %v", atClient)
			}
			for who, err := range map[string]error{"server": atServer, "client": atClient} {
				if who == "client" && tc.client {
					continue
				}
				if err == nil || !strings.Contains(err.Error(), tc.words) || strings.Contains(err.Error(), "\n") || len(err.Error()) > 400 {
					t.Errorf("%s: %v, expected %q", who, err, tc.words)
				}
			}
		})
	}
	dir := ca.host(t, "alpha")
	put(KeyFile, good.Key, 0o640)(t, dir)
	put(CertFile, good.Cert, 0o644)(t, dir)
	if _, err := NewServer(dir, nil, nil); err != nil {
		t.Errorf("a key that its group reads: %v", err)
	}
}

// replace puts the files of another directory in place of those of dir.
func replace(t testing.TB, dir, with string, names ...string) {
	t.Helper()
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join(with, name))
		check(t, err)
		check(t, os.WriteFile(filepath.Join(dir, name), b, 0o600))
	}
}

// TestFilesChange: files that change while the receiver waits are used from the next
// connection on, and such that cannot be used leave those before them in place.
func TestFilesChange(t *testing.T) {
	old, next := newCA(t), newCA(t)
	var out bytes.Buffer
	beta := old.host(t, "beta")
	s, err := NewServer(beta, nil, slog.New(slog.NewTextHandler(&out, nil)))
	check(t, err)
	config := s.Config() // one for all connections
	before, after := client(t, old.host(t, "alpha"), "beta"), client(t, next.host(t, "alpha"), "beta")
	talks := func(when string, c *tls.Config, ok bool) {
		t.Helper()
		a, b := handshake(t, c, config)
		if (a == nil && b == nil) != ok {
			t.Errorf("%s: %v, %v", when, a, b)
		}
	}
	talks("at first", before, true)
	talks("at first", after, false)
	changed := next.host(t, "beta")
	key, err := os.ReadFile(filepath.Join(changed, KeyFile))
	check(t, err)
	check(t, os.WriteFile(filepath.Join(beta, KeyFile), key[:len(key)/2], 0o600))
	for range 5 {
		talks("a half-written key", before, true)
	}
	boundedlog.Flush(t.Context(), s.log)
	if n := strings.Count(out.String(), "\n"); n != 2 || !strings.Contains(out.String(), "are not used") || !strings.Contains(out.String(), "more=4") {
		t.Errorf("%d lines: %s", n, out.String())
	}
	replace(t, beta, changed, KeyFile)
	talks("the key of another certificate", before, true)
	replace(t, beta, changed, CertFile)
	talks("a certificate of another authority", before, true)
	replace(t, beta, changed, CAFile)
	talks("after the change", before, false)
	talks("after the change", after, true)
	boundedlog.Flush(t.Context(), s.log)
	if n := strings.Count(out.String(), "\n"); n > 5 || !strings.Contains(out.String(), "are in use") {
		t.Errorf("%d lines: %s", n, out.String())
	}
	if strings.Contains(out.String(), "PRIVATE") {
		t.Error("the log has a key in it")
	}
	// Both authorities: nobody is refused on the way from one to the other.
	b, err := os.ReadFile(filepath.Join(old.host(t, "x"), CAFile))
	check(t, err)
	f, err := os.OpenFile(filepath.Join(beta, CAFile), os.O_APPEND|os.O_WRONLY, 0)
	check(t, err)
	_, err = f.Write(b)
	check(t, errors.Join(err, f.Close()))
	both := before.Clone()
	both.RootCAs = after.RootCAs
	talks("both", after, true)
	talks("both", both, true)
	check(t, os.RemoveAll(beta))
	talks("the directory is gone", after, true)
}

// TestFilesAreReadOnce: a handshake reads nothing if nothing has changed.
func TestFilesAreReadOnce(t *testing.T) {
	ca := newCA(t)
	beta := ca.host(t, "beta")
	s, err := NewServer(beta, nil, nil)
	check(t, err)
	for limit := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) { // the time stamps get old
		s.refresh()
		if s.settled {
			break
		}
		if time.Now().After(limit) {
			t.Fatal("the files are read at each handshake for ever")
		}
	}
	was := s.current.Load()
	if s.refresh(); s.current.Load() != was {
		t.Error("files that have not changed were read again")
	}
	now := time.Now().Add(-time.Hour)
	check(t, os.Chtimes(filepath.Join(beta, CertFile), now, now))
	if s.refresh(); s.current.Load() == was {
		t.Error("a file that was touched was not read again")
	}
}

func TestCA(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "ca")
	from := time.Now().Add(-time.Hour)
	check(t, CreateCA(dir, from, from.Add(48*time.Hour)))
	if err := CreateCA(dir, from, from.Add(48*time.Hour)); err == nil || !strings.Contains(err.Error(), "exists") {
		t.Errorf("a second authority: %v", err)
	}
	ca, err := OpenCA(dir)
	check(t, err)
	host := filepath.Join(dir, "alpha")
	check(t, ca.Issue(host, []string{"alpha", "10.0.0.1", "fe80::1"}, from, from.Add(1000*time.Hour)))
	if err := ca.Issue(host, []string{"alpha"}, from, from.Add(time.Hour)); err == nil || !strings.Contains(err.Error(), "exists") {
		t.Errorf("a second certificate: %v", err)
	}
	if all, err := os.ReadDir(dir); err != nil || len(all) != 3 {
		t.Errorf("%v, %v", all, err)
	}
	for path, mode := range map[string]os.FileMode{filepath.Join(dir, CAKeyFile): 0o600, filepath.Join(host, KeyFile): 0o600, host: 0o700 | os.ModeDir} {
		if st, err := os.Stat(path); err != nil || st.Mode() != mode {
			t.Errorf("%s: %v, %v", path, st.Mode(), err)
		}
	}
	c, err := ReadDir(host)
	check(t, err)
	all, err := parseCertificates(c.Cert)
	check(t, err)
	leaf := all[0]
	if !leaf.NotAfter.Equal(ca.Until()) || leaf.IsCA || len(leaf.DNSNames) != 1 || len(leaf.IPAddresses) != 2 {
		t.Errorf("%v %v %v until %v", leaf.IsCA, leaf.DNSNames, leaf.IPAddresses, leaf.NotAfter)
	}
	for _, name := range []string{"", "*.example", "a/b", "..", "0.0.0.0", "10.0.0.300", "a b"} {
		if err := CheckNames([]string{"alpha", name}); err == nil {
			t.Errorf("a certificate for %q", name)
		}
	}
	if err := ca.Issue(filepath.Join(dir, "none"), nil, from, from.Add(time.Hour)); err == nil {
		t.Error("a certificate for no host")
	}
	if err := ca.Issue(filepath.Join(dir, "b"), []string{"b"}, from, from); err == nil {
		t.Error("a certificate for no time")
	}
	if _, err := OpenCA(host); err == nil {
		t.Error("a host's directory is an authority")
	}
	if _, err := OpenCA(t.TempDir()); err == nil || !strings.Contains(err.Error(), "certs init") {
		t.Errorf("no authority: %v", err)
	}
}

// FuzzCredentials: whatever the API is given as PEM is refused in one line, or taken.
func FuzzCredentials(f *testing.F) {
	ca := newCA(f)
	c, err := ReadDir(ca.host(f, "alpha"))
	check(f, err)
	f.Add(c.CA, c.Cert, c.Key, "alpha")
	f.Add(c.CA, append(c.Cert, c.CA...), c.Key, "10.0.0.1")
	f.Fuzz(func(t *testing.T, ca, cert, key []byte, name string) {
		config, err := Credentials{ca, cert, key}.Client(name)
		if (config == nil) != (err != nil) || err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("%v, %v", config, err)
		}
	})
}
