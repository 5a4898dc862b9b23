// Package testcert makes certificate authorities and the certificates of hosts, for tests.
package testcert

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// CA is a certificate authority.
type CA struct {
	Cert *x509.Certificate
	Pool *x509.CertPool
	key  *ecdsa.PrivateKey
}

// Certificates are valid from long ago, also in the year 2000, when a bubble of
// testing/synctest begins.
var notBefore = time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC)

// NewCA makes an authority.
func NewCA(t testing.TB, name string) *CA {
	t.Helper()
	template := &x509.Certificate{SerialNumber: serial(t), Subject: pkix.Name{CommonName: name}, NotBefore: notBefore,
		NotAfter: time.Now().AddDate(1, 0, 0), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	ca := &CA{key: newKey(t), Pool: x509.NewCertPool()}
	ca.Cert = sign(t, template, template, ca.key, ca.key)
	ca.Pool.AddCert(ca.Cert)
	return ca
}

// Issue makes a certificate for a host with these names, and a key.
func (ca *CA) Issue(t testing.TB, names ...string) tls.Certificate {
	t.Helper()
	return ca.IssueFor(t, newKey(t), time.Now().AddDate(1, 0, 0), names...)
}

// Expired is Issue for a certificate that is not valid any more.
func (ca *CA) Expired(t testing.TB, names ...string) tls.Certificate {
	t.Helper()
	return ca.IssueFor(t, newKey(t), notBefore.AddDate(0, 1, 0), names...)
}

// Renew makes another certificate for the key of c.
func (ca *CA) Renew(t testing.TB, c tls.Certificate, names ...string) tls.Certificate {
	t.Helper()
	return ca.IssueFor(t, c.PrivateKey.(*ecdsa.PrivateKey), time.Now().AddDate(2, 0, 0), names...)
}

// IssueFor makes a certificate for a key.
func (ca *CA) IssueFor(t testing.TB, key *ecdsa.PrivateKey, notAfter time.Time, names ...string) tls.Certificate {
	t.Helper()
	return ca.issue(t, key, notAfter, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, names)
}

// IssueUsage makes a certificate for these uses only.
func (ca *CA) IssueUsage(t testing.TB, usage []x509.ExtKeyUsage, names ...string) tls.Certificate {
	t.Helper()
	return ca.issue(t, newKey(t), time.Now().AddDate(1, 0, 0), usage, names)
}

func (ca *CA) issue(t testing.TB, key *ecdsa.PrivateKey, notAfter time.Time, usage []x509.ExtKeyUsage, names []string) tls.Certificate {
	t.Helper()
	template := &x509.Certificate{SerialNumber: serial(t), NotBefore: notBefore, NotAfter: notAfter, DNSNames: names,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: usage}
	cert := sign(t, template, ca.Cert, key, ca.key)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

// Client is the configuration of a source that shows cert and expects a destination of this
// name. "": the name is that of the address.
func (ca *CA) Client(cert tls.Certificate, serverName string) *tls.Config {
	return &tls.Config{RootCAs: ca.Pool, Certificates: []tls.Certificate{cert}, ServerName: serverName}
}

// Server is the configuration of a destination that shows cert.
func (ca *CA) Server(cert tls.Certificate) *tls.Config {
	return &tls.Config{ClientCAs: ca.Pool, ClientAuth: tls.RequireAndVerifyClientCert, Certificates: []tls.Certificate{cert}}
}

// WriteDir writes ca.pem, cert.pem and key.pem into a new directory, and returns it.
func (ca *CA) WriteDir(t testing.TB, cert tls.Certificate) string {
	t.Helper()
	dir := t.TempDir()
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]pem.Block{"ca.pem": {Type: "CERTIFICATE", Bytes: ca.Cert.Raw},
		"cert.pem": {Type: "CERTIFICATE", Bytes: cert.Certificate[0]}, "key.pem": {Type: "PRIVATE KEY", Bytes: key}} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func serial(t testing.TB) *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func sign(t testing.TB, template, parent *x509.Certificate, key, by *ecdsa.PrivateKey) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, by)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}
