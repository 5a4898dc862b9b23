package hosttls

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// CAKeyFile is the private key of an authority, in the directory of its CAFile.
const CAKeyFile = "ca-key.pem"

// CA is an authority that signs the certificates of hosts.
type CA struct {
	cert *x509.Certificate
	pem  []byte
	key  crypto.Signer
}

// CreateCA makes an authority: CAFile and CAKeyFile in a directory, which it creates if
// necessary. It overwrites nothing.
func CreateCA(dir string, from, until time.Time) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, name := range []string{CAFile, CAKeyFile} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			return fmt.Errorf("%s exists: there is an authority in this directory", filepath.Join(dir, name))
		}
	}
	t, err := template(from, until)
	if err != nil {
		return err
	}
	t.Subject = pkix.Name{CommonName: "govmm hosts " + rand.Text()[:8]} // no two authorities have the same name
	t.IsCA, t.BasicConstraintsValid, t.MaxPathLenZero = true, true, true
	t.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	cert, key, err := sign(t, t, nil)
	if err != nil {
		return err
	}
	if err := writeNew(filepath.Join(dir, CAKeyFile), key, 0o600); err != nil {
		return err
	}
	if err := writeNew(filepath.Join(dir, CAFile), cert, 0o644); err != nil {
		return errors.Join(err, os.Remove(filepath.Join(dir, CAKeyFile)))
	}
	return nil
}

// OpenCA reads an authority that CreateCA has made, or another one whose key is not
// encrypted.
func OpenCA(dir string) (*CA, error) {
	cert, err := readFile(filepath.Join(dir, CAFile), 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no authority in %s: govmm certs init %s makes one", dir, dir)
	}
	if err != nil {
		return nil, err
	}
	key, err := readFile(filepath.Join(dir, CAKeyFile), 0o027)
	if err != nil {
		return nil, err
	}
	if _, err = parseCA(cert, time.Now()); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, CAFile), err)
	}
	pair, err := keyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, CAKeyFile), err)
	}
	signer, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s: a key of type %T signs nothing", filepath.Join(dir, CAKeyFile), pair.PrivateKey)
	}
	return &CA{cert: pair.Leaf, pem: cert, key: signer}, nil
}

// Until returns when the authority's own certificate ends: none that it signs is valid
// for longer.
func (ca *CA) Until() time.Time { return ca.cert.NotAfter }

// Issue makes a directory for a host with the three files, and a new key. names are the
// host's DNS names and IP addresses; the first of them is the certificate's common name
// too. The directory appears whole, or not at all; it must not exist.
func (ca *CA) Issue(dir string, names []string, from, until time.Time) error {
	t, err := template(from, until)
	if err != nil {
		return err
	}
	if err := addNames(t, names); err != nil {
		return err
	}
	if t.NotAfter.After(ca.Until()) {
		t.NotAfter = ca.Until()
	}
	t.KeyUsage = x509.KeyUsageDigitalSignature
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	cert, key, err := sign(t, ca.cert, ca.key)
	if err != nil {
		return err
	}
	temp, err := os.MkdirTemp(filepath.Dir(dir), ".new-") // of mode 0700
	if err != nil {
		return err
	}
	err = errors.Join(writeNew(filepath.Join(temp, CAFile), ca.pem, 0o644), writeNew(filepath.Join(temp, CertFile), cert, 0o644),
		writeNew(filepath.Join(temp, KeyFile), key, 0o600))
	if err == nil {
		err = unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, dir, unix.RENAME_NOREPLACE)
	}
	if err == nil {
		return nil
	}
	_ = os.RemoveAll(temp) // nothing else is in it
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%s exists: move it away, or give another name", dir)
	}
	return fmt.Errorf("make %s: %w", dir, err)
}

// CheckNames reports why Issue would refuse names.
func CheckNames(names []string) error { return addNames(&x509.Certificate{}, names) }

func addNames(t *x509.Certificate, names []string) error {
	if len(names) == 0 {
		return errors.New("a host needs a name")
	}
	for _, name := range names {
		if a, err := netip.ParseAddr(name); err == nil && a.Zone() == "" && !a.IsUnspecified() {
			t.IPAddresses = append(t.IPAddresses, net.IP(a.Unmap().AsSlice()))
		} else if isDNSName(name) {
			t.DNSNames = append(t.DNSNames, name)
		} else {
			return fmt.Errorf("host %.80q: expected a DNS name or an IP address", name)
		}
	}
	t.Subject.CommonName = names[0]
	if len(t.Subject.CommonName) > 64 { // RFC 5280, ub-common-name
		t.Subject.CommonName = ""
	}
	return nil
}

func template(from, until time.Time) (*x509.Certificate, error) {
	if !until.After(from) {
		return nil, errors.New("a certificate must be valid for some time")
	}
	return &x509.Certificate{NotBefore: from, NotAfter: until}, nil // the serial number is a random one
}

// sign makes a key and its certificate, both in PEM. by is nil for one that signs itself.
// P-256 is what all implementations have, and what Go has in assembly.
func sign(t, parent *x509.Certificate, by crypto.Signer) (cert, key []byte, err error) {
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	if by == nil {
		by = own
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, own.Public(), by)
	if err != nil {
		return nil, nil, err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(own)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), nil
}

// writeNew writes a file that must not exist. After an error there is none.
func writeNew(path string, data []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(path)
	}
	return err
}
