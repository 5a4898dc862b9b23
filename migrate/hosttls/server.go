package hosttls

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/govmm/govmm/internal/boundedlog"
	"golang.org/x/sys/unix"
)

// Server has the credentials of a destination, which it reads again when they have
// changed. It looks at each handshake, by stat. The process needs to be able to read the
// directory, and what symbolic links in it lead to, for as long as it receives.
type Server struct {
	dir   string
	allow []Pattern
	log   *slog.Logger

	current atomic.Pointer[tls.Config]

	reading sync.Mutex // held by the one handshake that looks; guards the two below
	seen    stamps
	settled bool // a change of the files would change seen
}

// stamps say whether the three files are those that were read.
type stamps [3]struct {
	dev, ino uint64
	size     int64
	mtime    unix.Timespec
	ctime    unix.Timespec
}

// settling is how long after a change of a file another one may leave the same time
// stamps: file systems count time in steps, of 2 s at most (FAT).
const settling = 3 * time.Second

// NewServer reads and checks the files of a directory. allow says which names may hand
// over a guest; without any, each certificate that a trusted authority has signed does.
// log is told when files have changed, and why changed ones are not used; nil: nobody.
func NewServer(dir string, allow []Pattern, log *slog.Logger) (*Server, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Server{dir: dir, allow: allow, log: boundedlog.New(log)}
	if err := s.read(stampsOf(dir)); err != nil {
		return nil, err
	}
	return s, nil
}

// Config returns the configuration for all connections. Its GetConfigForClient gives
// each of them the files as they are then.
func (s *Server) Config() *tls.Config {
	c := s.current.Load().Clone()
	c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		s.refresh()
		return s.current.Load(), nil
	}
	return c
}

// refresh reads the files again if they have changed. What cannot be used, such as a
// file that is half written, leaves everything as it was.
func (s *Server) refresh() {
	if !s.reading.TryLock() {
		return // another handshake looks
	}
	defer s.reading.Unlock()
	now := stampsOf(s.dir)
	changed := now != s.seen
	if s.settled && !changed {
		if err := checkTime(s.current.Load().Certificates[0].Leaf, time.Now()); err != nil {
			s.log.Warn("peers refuse this host's certificate", "dir", s.dir, "err", err.Error())
		}
		return
	}
	if err := s.read(now); err != nil {
		s.log.Warn("TLS files that have changed are not used, those before them are", "dir", s.dir, "err", err.Error())
	} else if changed {
		s.log.Info("TLS files that have changed are in use", "dir", s.dir)
	}
}

// read makes the files the current ones. After an error they are read again at the next
// handshake.
func (s *Server) read(now stamps) error {
	s.settled = false
	c, err := ReadDir(s.dir)
	if err != nil {
		return err
	}
	id, err := c.parse(time.Now(), x509.ExtKeyUsageServerAuth)
	if err != nil {
		return fmt.Errorf("%s: %w", s.dir, err)
	}
	s.current.Store(&tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{id.cert},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: id.trusted,
		VerifyConnection: s.verify,
		// A ticket would outlive the authority that its certificate was checked with.
		SessionTicketsDisabled: true,
	})
	s.seen, s.settled = now, now.settled(time.Now())
	return nil
}

// verify applies the patterns to a certificate that a trusted authority has signed.
func (s *Server) verify(cs tls.ConnectionState) error {
	if len(cs.PeerCertificates) == 0 {
		return errors.New("the peer shows no certificate")
	}
	leaf := cs.PeerCertificates[0]
	for _, p := range s.allow {
		if p.allows(leaf) {
			return nil
		}
	}
	if len(s.allow) == 0 {
		return nil
	}
	return fmt.Errorf("the peer's certificate is that of %s: --tls-allow does not let it hand over a guest", namesOf(leaf))
}

// stampsOf returns zero stamps for a file that cannot be looked at.
func stampsOf(dir string) (all stamps) {
	for i, name := range []string{CAFile, CertFile, KeyFile} {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, name), &st); err != nil {
			continue // to read it says why
		}
		all[i].dev, all[i].ino, all[i].size, all[i].mtime, all[i].ctime = st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim
	}
	return all
}

func (s *stamps) settled(now time.Time) bool {
	for _, f := range s {
		if now.Sub(time.Unix(f.ctime.Unix())) < settling {
			return false
		}
	}
	return true
}
