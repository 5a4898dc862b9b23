package migrate

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
)

// TLS below the frames: version 1.3 of crypto/tls, and each side shows a certificate that
// the other one verifies. One port takes both kinds of connections: a hello begins with
// 'G', TLS with a record of the type below.

// tlsFirstByte is the type of a TLS record with a handshake message (RFC 8446, section 5.1).
const tlsFirstByte = 22

// alpn is the protocol that both sides name (RFC 7301): a certificate that a host uses for
// something else too must not lead a connection there.
const alpn = "govmm-migrate"

// identity is the SHA-256 of the public key in the peer's certificate; zero: the
// connection is plain. A certificate that was renewed for the same key is the same peer.
type identity [sha256.Size]byte

// errNotTLS is why a receiver with TLS refuses a plain connection.
var errNotTLS = openly("this host takes guests by TLS only, and the connection is plain")

// errNoTLS is why one without TLS refuses a connection with it.
var errNoTLS = openly("the connection is TLS, and this host receives without TLS")

// restrict returns a copy of a configuration with what the engine insists on.
func restrict(c *tls.Config) (*tls.Config, error) {
	c = c.Clone()
	if c.MaxVersion != 0 && c.MaxVersion < tls.VersionTLS13 {
		return nil, errors.New("TLS configuration: must allow TLS 1.3")
	}
	c.MinVersion, c.MaxVersion = tls.VersionTLS13, tls.VersionTLS13
	c.NextProtos = []string{alpn}
	// A resumed connection would show no certificate.
	c.SessionTicketsDisabled, c.ClientSessionCache = true, nil
	c.DynamicRecordSizingDisabled = true // full records from the start
	return c, nil
}

// clientTLS checks the configuration of a source.
func clientTLS(c *tls.Config) (*tls.Config, error) {
	switch {
	case c.InsecureSkipVerify:
		return nil, errors.New("TLS configuration: must verify the destination's certificate (InsecureSkipVerify)")
	case c.RootCAs == nil:
		return nil, errors.New("TLS configuration: must name the CA of the destination (RootCAs)")
	case len(c.Certificates) == 0 && c.GetClientCertificate == nil:
		return nil, errors.New("TLS configuration: must have a certificate for this host (Certificates)")
	}
	return restrict(c)
}

// serverTLS checks the configuration of a destination, and each that its GetConfigForClient
// returns.
func serverTLS(c *tls.Config) (*tls.Config, error) {
	if get := c.GetConfigForClient; get != nil {
		base := c.Clone()
		base.GetConfigForClient = nil
		outer, err := restrict(c)
		if err != nil {
			return nil, err
		}
		outer.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			c, err := get(h)
			if err != nil {
				return nil, err
			}
			if c == nil {
				c = base
			}
			inner := c.Clone()
			inner.GetConfigForClient = nil
			return serverTLS(inner)
		}
		return outer, nil
	}
	switch {
	case c.ClientAuth != tls.RequireAndVerifyClientCert:
		return nil, errors.New("TLS configuration: must require and verify a certificate of the source (ClientAuth)")
	case c.ClientCAs == nil:
		return nil, errors.New("TLS configuration: must name the CA of the sources (ClientCAs)")
	case len(c.Certificates) == 0 && c.GetCertificate == nil:
		return nil, errors.New("TLS configuration: must have a certificate for this host (Certificates)")
	}
	return restrict(c)
}

// credentials are what a source shows and checks on all connections of one migration.
type credentials struct {
	config *tls.Config
	limit  uint64 // keyLimit

	certMu sync.Mutex // guards cert
	cert   *tls.Certificate
}

// newCredentials prepares for connections to address. A configuration without a
// ServerName takes the address's host.
func newCredentials(config *tls.Config, address string) (*credentials, error) {
	config, err := clientTLS(config)
	if err != nil {
		return nil, err
	}
	if config.ServerName == "" {
		host, _, err := net.SplitHostPort(address)
		if err != nil || host == "" || isUnix(address) {
			return nil, fmt.Errorf("TLS to %s: no host name in it, and none is given for the certificate (ServerName)", address)
		}
		config.ServerName = host
	}
	return &credentials{config: config, limit: keyLimit}, nil
}

// certificate chooses the certificate once: the destination knows a session by it.
func (k *credentials) certificate(info *tls.CertificateRequestInfo) (*tls.Certificate, error) {
	k.certMu.Lock()
	defer k.certMu.Unlock()
	if k.cert == nil && k.config.GetClientCertificate != nil {
		cert, err := k.config.GetClientCertificate(info)
		if err != nil {
			return nil, err
		}
		k.cert = cert
	}
	if k.cert == nil {
		// Also one of a CA that the destination does not name: it says what is wrong then.
		k.cert = &k.config.Certificates[0]
		for i := range k.config.Certificates {
			if info.SupportsCertificate(&k.config.Certificates[i]) == nil {
				k.cert = &k.config.Certificates[i]
				break
			}
		}
	}
	return k.cert, nil
}

// handshake makes c a connection over TLS. The destination verifies this host's
// certificate after it: what it finds comes with the first read.
func (k *credentials) handshake(ctx context.Context, c *conn) error {
	asked := false
	config := k.config.Clone()
	config.GetClientCertificate = func(info *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		asked = true
		return k.certificate(info)
	}
	lower := &lower{flow: c.flow, limit: k.limit}
	t := tls.Client(lower, config)
	if err := t.HandshakeContext(ctx); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		return explainTLS(err, "destination")
	}
	if !asked {
		return errors.New("the destination did not ask for this host's certificate")
	}
	return c.secure(t, lower, "destination")
}

// handshake makes c, whose first byte has been read, a connection over TLS. Its deadline
// bounds that.
func (r *Receiver) handshake(c *conn, first byte) error {
	lower := &lower{flow: c.flow, first: []byte{first}, limit: r.keyLimit}
	t := tls.Server(lower, r.tls)
	if err := t.Handshake(); err != nil {
		return explainTLS(err, "source")
	}
	return c.secure(t, lower, "source")
}

// secure puts TLS, whose handshake is done, between c's frames and its flow.
func (c *conn) secure(t *tls.Conn, lower *lower, peer string) error {
	state := t.ConnectionState()
	switch {
	case state.Version != tls.VersionTLS13 || len(state.PeerCertificates) == 0:
		return fmt.Errorf("TLS without a certificate of the %s", peer)
	case state.NegotiatedProtocol != alpn:
		return fmt.Errorf("the %s speaks TLS, but not for a migration: it does not name the protocol %s", peer, alpn)
	}
	c.from = sha256.Sum256(state.PeerCertificates[0].RawSubjectPublicKeyInfo)
	c.stream, c.lower, c.peer = t, lower, peer
	return nil
}

// explainTLS says what an error of crypto/tls means for a migration.
func explainTLS(err error, peer string) error {
	var alien tls.RecordHeaderError
	var invalid *tls.CertificateVerificationError
	var op *net.OpError
	switch {
	case errors.As(err, &alien) && alien.RecordHeader[0] == byte(frameRefused):
		return fmt.Errorf("the %s receives without TLS", peer)
	case errors.As(err, &alien):
		return fmt.Errorf("the %s does not speak TLS", peer)
	case errors.As(err, &invalid):
		return fmt.Errorf("the %s's certificate is not accepted here: %w", peer, invalid.Err)
	case errors.As(err, &op) && op.Op == "remote error":
		return explainAlert(err, peer)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("the %s closed the connection in the TLS handshake: %w", peer, io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("TLS handshake: %w", err)
}

// explainAlert is explainTLS for an error that comes after the handshake: an alert of the
// peer, or of this side, or one that has nothing to do with TLS.
func explainAlert(err error, peer string) error {
	op := (*net.OpError)(nil)
	if !errors.As(err, &op) || op.Op != "remote error" && op.Op != "local error" {
		return err
	}
	alert := strings.TrimPrefix(op.Err.Error(), "tls: ")
	switch {
	case op.Op == "local error": // such as a record that was changed on its way
		return fmt.Errorf("%w: what came is not what the %s sent by TLS: %s", ErrProtocol, peer, alert)
	case !strings.Contains(alert, "certificate") && alert != "access denied":
		return fmt.Errorf("the %s ended TLS: %s", peer, alert)
	case peer == "destination":
		return fmt.Errorf("%w: it does not accept this host's certificate: %s", ErrRefused, alert)
	}
	return fmt.Errorf("the %s does not accept this host's certificate: %s", peer, alert)
}
