// Package hosttls makes the TLS configurations with which two hosts migrate a guest,
// from a directory with three PEM files on each of them:
//
//	ca.pem    the certificates of the authorities that both trust
//	cert.pem  this host's certificate, and those between it and an authority
//	key.pem   the private key of this host's certificate
//
// Both sides show a certificate, in TLS 1.3 only. [ReadDir] and [Credentials.Client] are
// for the source, [NewServer] is for the destination, which reads files again that have
// changed. [CreateCA] and [CA.Issue] make such directories for a first try; who has
// an authority of his own uses that one.
package hosttls

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	_ "github.com/govmm/govmm/internal/supported" // Linux on x86-64 only
	"golang.org/x/sys/unix"
)

// The files of a directory.
const (
	CAFile   = "ca.pem"
	CertFile = "cert.pem"
	KeyFile  = "key.pem"
)

// MaxFile bounds each file, in bytes: about 40 certificates.
const MaxFile = 64 << 10

// Credentials are what a host trusts and shows: the contents of the three files.
type Credentials struct{ CA, Cert, Key []byte }

// ReadDir reads the files of a directory. It refuses a key that users other than its
// owner and its group can read, or others than its owner can write.
func ReadDir(dir string) (c Credentials, err error) {
	for _, f := range []struct {
		name string
		into *[]byte
		deny fs.FileMode
	}{{CAFile, &c.CA, 0}, {CertFile, &c.Cert, 0}, {KeyFile, &c.Key, 0o027}} {
		*f.into, err = readFile(filepath.Join(dir, f.name), f.deny)
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%s is missing in %s: a host needs %s, %s and %s there (govmm certs --help)", f.name, dir, CAFile, CertFile, KeyFile)
		}
		if err != nil {
			return Credentials{}, err
		}
	}
	return c, nil
}

// readFile reads a file that has none of the permissions in deny.
func readFile(path string, deny fs.FileMode) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO must not block
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	st, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !st.Mode().IsRegular():
		return nil, fmt.Errorf("%s: expected a file, found %v", path, st.Mode())
	case st.Mode().Perm()&deny != 0:
		return nil, fmt.Errorf("%s: mode %#o lets other users at the private key; chmod 600 %s", path, st.Mode().Perm(), path)
	}
	b, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err == nil && len(b) > MaxFile {
		err = fmt.Errorf("%s: must be at most %d bytes", path, MaxFile)
	}
	return b, err
}

// Client returns the configuration of a source that takes the peer for its destination
// only if the peer's certificate carries serverName, a DNS name or an IP address.
func (c Credentials) Client(serverName string) (*tls.Config, error) {
	if err := checkServerName(serverName); err != nil {
		return nil, err
	}
	id, err := c.parse(time.Now(), x509.ExtKeyUsageClientAuth)
	if err != nil {
		return nil, err
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{id.cert}, RootCAs: id.trusted, ServerName: serverName}, nil
}

// identity is a host's credentials once they make sense.
type identity struct {
	cert    tls.Certificate
	trusted *x509.CertPool
}

// parse checks all that can be known of credentials before a peer is asked.
func (c Credentials) parse(now time.Time, usage x509.ExtKeyUsage) (*identity, error) {
	for _, f := range []struct {
		name string
		data []byte
	}{{CAFile, c.CA}, {CertFile, c.Cert}, {KeyFile, c.Key}} {
		if len(f.data) > MaxFile {
			return nil, fmt.Errorf("%s: must be at most %d bytes", f.name, MaxFile)
		}
	}
	id := &identity{}
	var err error
	if id.trusted, err = parseCA(c.CA, now); err != nil {
		return nil, fmt.Errorf("%s: %w", CAFile, err)
	}
	chain, err := parseCertificates(c.Cert)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", CertFile, err)
	}
	if id.cert, err = keyPair(c.Cert, c.Key); err != nil {
		return nil, fmt.Errorf("%s: %w", KeyFile, err)
	}
	if err := checkOwn(chain, id.trusted, now, usage); err != nil {
		return nil, fmt.Errorf("%s: %w", CertFile, err)
	}
	return id, nil
}

// parseCA reads the authorities that are trusted.
func parseCA(data []byte, now time.Time) (*x509.CertPool, error) {
	all, err := parseCertificates(data)
	if err != nil {
		return nil, err
	}
	pool, valid := x509.NewCertPool(), false
	for _, c := range all {
		if !c.BasicConstraintsValid || !c.IsCA || c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0 {
			return nil, fmt.Errorf("the certificate of %.80q is not one of an authority (CA), and may sign no other", c.Subject)
		}
		pool.AddCert(c)
		if err = checkTime(c, now); err == nil {
			valid = true
		}
	}
	if !valid {
		return nil, err
	}
	return pool, nil
}

// parseCertificates reads one PEM block after another.
func parseCertificates(data []byte) (all []*x509.Certificate, err error) {
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			break
		}
		data = rest
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("expected PEM blocks of type CERTIFICATE, found %.40q", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, errors.New(words(err))
		}
		all = append(all, c)
	}
	if len(all) == 0 || bytes.Contains(data, []byte("-----BEGIN")) {
		return nil, errors.New("expected certificates in PEM, found text that is none, or cut off")
	}
	return all, nil
}

// keyPair joins a certificate, which has been parsed, and its key.
func keyPair(cert, key []byte) (tls.Certificate, error) {
	if bytes.Contains(key, []byte("ENCRYPTED")) {
		return tls.Certificate{}, errors.New("the key is encrypted: govmm takes one without a passphrase")
	}
	pair, err := tls.X509KeyPair(cert, key)
	switch {
	case err == nil:
		return pair, nil
	case strings.Contains(err.Error(), "does not match"):
		return pair, fmt.Errorf("the key is not that of %s", CertFile)
	}
	return pair, errors.New(words(err))
}

// checkOwn reports what would make each peer refuse this host's certificate.
func checkOwn(chain []*x509.Certificate, trusted *x509.CertPool, now time.Time, usage x509.ExtKeyUsage) error {
	leaf := chain[0]
	if err := checkTime(leaf, now); err != nil {
		return err
	}
	if usage == x509.ExtKeyUsageServerAuth && len(leaf.DNSNames)+len(leaf.IPAddresses) == 0 {
		return errors.New("it names no host: there is no DNS name and no IP address in subjectAltName, and the common name does not count")
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err := leaf.Verify(x509.VerifyOptions{Roots: trusted, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}})
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &unknown):
		return fmt.Errorf("no authority of %s has signed it", CAFile)
	case errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage:
		return fmt.Errorf("it may not be used by a TLS %s: extendedKeyUsage lacks it",
			map[x509.ExtKeyUsage]string{x509.ExtKeyUsageServerAuth: "server", x509.ExtKeyUsageClientAuth: "client"}[usage])
	case err != nil:
		return errors.New(words(err))
	}
	return nil
}

func checkTime(c *x509.Certificate, now time.Time) error {
	const layout = "2006-01-02 15:04:05 UTC" // the zone's file may be out of reach
	switch {
	case now.After(c.NotAfter):
		return fmt.Errorf("the certificate of %.80q has expired on %s", c.Subject, c.NotAfter.UTC().Format(layout))
	case now.Before(c.NotBefore):
		return fmt.Errorf("the certificate of %.80q is valid from %s, and this host's clock says %s", c.Subject,
			c.NotBefore.UTC().Format(layout), now.UTC().Format(layout))
	}
	return nil
}

// words is an error of the standard library as one line, without the package's name.
func words(err error) string {
	s := strings.ReplaceAll(err.Error(), "\n", "; ")
	return strings.TrimPrefix(strings.TrimPrefix(s, "tls: "), "x509: ")
}
