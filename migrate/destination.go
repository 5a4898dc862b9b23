package migrate

import (
	"context"
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/govmm/govmm/internal/boundedlog"
)

// Receiver is the destination: it takes migrations until one completes, and from
// then on answers queries about it.
type Receiver struct {
	builder   Builder
	log       *slog.Logger  // bounded: whoever can connect must not be able to fill a log
	timeout   time.Duration // for a silent source
	known     []string      // features
	arrived   chan Target
	newcomers newcomers
	tls       *tls.Config // nil: connections must be plain
	keyLimit  uint64      // keyLimit
	keeps     bool        // snapshots, and takes nothing else
	user      int         // whose processes may connect beside those of this one's; 0: nobody's

	sessionMu sync.Mutex // guards the fields below
	active    *session   // the migration under way
	taken     bool       // a guest has arrived: no further migration
	probes    int        // under way
	verdicts  verdicts
	tail      *intake // of the session whose guest has arrived; nil: all of its memory had
}

// NewReceiver returns a receiver that builds machines with b. It logs each attempt
// that is refused, fails or completes; nil: nothing is logged.
func NewReceiver(b Builder, log *slog.Logger) *Receiver {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	known := knownFeatures
	if _, ok := b.(Sharer); ok {
		known = append(slices.Clone(known), featureShared)
	}
	return &Receiver{builder: b, log: boundedlog.New(log), timeout: defaultPeerTimeout, known: known, keyLimit: keyLimit,
		arrived: make(chan Target, 1), verdicts: verdicts{kept: map[sessionID]keptVerdict{}}}
}

// RequireTLS makes the receiver take TLS 1.3 and no plain connections. It is called before
// Serve. The configuration, and each that its GetConfigForClient returns, must require and
// verify a certificate of the source, by its own ClientCAs. All connections of a migration,
// and a query about it later, must be of one key: see [identity].
func (r *Receiver) RequireTLS(config *tls.Config) (err error) {
	r.tls, err = serverTLS(config)
	return err
}

// warn logs what a peer did, or what came of it.
func (r *Receiver) warn(msg string, peer net.Addr, err error) {
	r.log.Warn(msg, "peer", peer, "err", clip(err.Error()))
}

// Arrived delivers the machine that got the right to run, once.
func (r *Receiver) Arrived() <-chan Target { return r.arrived }

// Serve accepts connections until ctx ends. Then it closes ln, ends the connections
// under way and waits for them: a source learns why before its connections end, and
// takes its guest back. A migration that fails does not end Serve.
func (r *Receiver) Serve(ctx context.Context, ln net.Listener) error {
	ending := ctx
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer boundedlog.Tell(r.log)
	var conns sync.WaitGroup
	defer conns.Wait()
	defer cancel(errEnding)
	stop := context.AfterFunc(ending, func() {
		ln.Close()
		cancel(errEnding)
		r.finishTail()
	})
	defer stop()
	for {
		nc, err := ln.Accept()
		if err != nil {
			if ending.Err() != nil {
				return nil
			}
			if te, ok := err.(interface{ Temporary() bool }); ok && te.Temporary() {
				// Such as no free descriptor.
				select {
				case <-time.After(100 * time.Millisecond):
					continue
				case <-ending.Done():
					return nil
				}
			}
			return fmt.Errorf("accept on %v: %w", ln.Addr(), err)
		}
		conns.Go(func() { r.serveConn(ctx, nc) })
	}
}

// serveConn serves one connection.
func (r *Receiver) serveConn(ctx context.Context, nc net.Conn) {
	defer nc.Close()
	r.enter(nc)
	defer r.newcomers.leave(nc)
	c := newConn(nc)
	stop := context.AfterFunc(ctx, c.interrupt)
	defer stop()
	peer := c.RemoteAddr()
	_ = c.SetDeadline(time.Now().Add(r.timeout)) // for the hello as a whole, and for the answer to a query
	if err := r.checkPeer(nc); err != nil {
		r.warn("connection refused", peer, err)
		if r.tls == nil {
			_ = c.writeControl(frameRefused, refused{reasonsOf(err)}) // it may be gone
		}
		drain(c)
		return
	}
	b, err := r.readHello(c)
	switch {
	case err == nil:
	case ctx.Err() != nil, !r.newcomers.leave(nc): // or it was closed for another one
		return
	case errors.Is(err, os.ErrDeadlineExceeded):
		r.warn("connection refused", peer, fmt.Errorf("the peer did not say hello within %v", r.timeout))
		return
	default:
		r.enter(nc) // again: what is left takes a moment
		r.warn("connection refused", peer, err)
		if errors.Is(err, errNoTLS) {
			_ = c.writeControl(frameRefused, refused{reasonsOf(err)}) // which a source with TLS recognizes
		}
		drain(c)
		return
	}
	h, err := decodeHello(&b)
	if errors.Is(err, errNotGovmm) {
		r.warn("connection refused", peer, err)
		return
	}
	if r.tls != nil && c.lower == nil {
		err = errNotTLS
	}
	if h.purpose == purposeQuery && err == nil {
		r.newcomers.leave(nc) // it is answered, however many come meanwhile
		if err := r.answer(ctx, c, h.session); err != nil {
			r.warn("query refused", peer, err)
			_ = c.writeControl(frameRefused, refused{reasonsOf(err)})
		}
		return
	}
	_ = c.SetDeadline(time.Time{})
	if ctx.Err() != nil { // the deadline may have been the end's
		return
	}
	var in *inlet
	switch {
	case err != nil:
	case h.purpose == purposeData && h.renews:
		if in, err = r.follow(h, c); err == nil {
			stop() // as below
			r.newcomers.leave(nc)
			<-in.done
			return
		}
	case h.purpose == purposeData:
		in, err = r.join(h, c)
	case h.purpose == purposeMissing:
		var later *intake
		if later, err = r.intakeOf(h, c); err == nil {
			stop() // the intake ends them
			r.newcomers.leave(nc)
			if err = later.serve(h, c); err == nil {
				return
			}
		}
	case h.purpose == purposeProbe:
		if err = r.serveProbe(ctx, c); err == nil {
			return
		}
	case h.purpose != purposeMigrate:
		err = fmt.Errorf("%w: hello with unknown purpose %d", ErrProtocol, h.purpose)
	}
	if err != nil {
		r.warn("connection refused", peer, err)
		_ = c.writeControl(frameRefused, refused{reasonsOf(err)}) // it may be gone
		drain(c)
		return
	}
	stop() // from here on the session ends its connections, when the source knows why
	if in != nil {
		r.newcomers.leave(nc)
		in.serve()
		return
	}
	if r.takeMigration(ctx, c, h) {
		debug.FreeOSMemory() // a session takes much more than a receiver at rest
	}
}

// readHello reads the hello of a connection, over TLS if it begins with that.
func (r *Receiver) readHello(c *conn) (b [helloSize]byte, err error) {
	if err = c.readFull(b[:1]); err == nil && b[0] == tlsFirstByte {
		if r.tls == nil {
			return b, errNoTLS
		}
		if err := r.handshake(c, b[0]); err != nil {
			return b, err
		}
		err = c.readFull(b[:1])
	}
	if err == nil {
		err = c.readFull(b[1:])
	}
	if err != nil {
		err = fmt.Errorf("the peer did not say hello: %w", err)
	}
	return b, err
}

// enter makes a connection a newcomer.
func (r *Receiver) enter(nc net.Conn) {
	if oldest := r.newcomers.enter(nc); oldest != nil {
		peer := peerOf(oldest)
		oldest.Close()
		r.warn("connection closed", peer, errCrowded)
	}
}

// errCrowded is why the oldest of many connections that say nothing is closed.
var errCrowded = fmt.Errorf("more than %d connections have not said what they are for", maxNewcomers)

// errEnding is why everything ends when the context of Serve does.
var errEnding = openly("the receiver is being stopped")

// drain reads on for a moment: closing a socket with unread bytes sends a reset, which
// could overtake the refusal.
func drain(c *conn) {
	_ = c.SetReadDeadline(time.Now().Add(time.Second))
	_, _ = io.CopyN(io.Discard, c.flow, 64<<20)
}

// takeMigration receives one migration. failed is false also if it was refused.
func (r *Receiver) takeMigration(ctx context.Context, c *conn, h hello) (failed bool) {
	peer := c.RemoteAddr()
	s, err := r.begin(ctx, h, c)
	if err != nil {
		r.warn("migration refused", peer, err)
		_ = c.writeControl(frameRefused, refused{reasonsOf(err)}) // it may be gone
		drain(c)
		return false
	}
	r.newcomers.leave(c.flow.Conn)
	defer s.close()
	err = s.receive(ctx, r, h.alive)
	if s.settle() {
		// First the source, whose guest may stand still: it takes time to free a large
		// machine, and a connection that closes without a reason leaves a question open.
		s.tellFailure(err)
	}
	target := s.finish()
	r.end(s, target != nil)
	if target != nil {
		r.log.Info("the guest runs here now", "peer", peer)
		r.arrived <- target
		return false
	}
	switch {
	case ctx.Err() != nil:
		r.warn("migration failed", peer, err)
	case errors.Is(err, errChecked):
		r.log.Info("a source has asked whether its guest could come", "peer", peer)
	default:
		r.warn("migration failed, still listening", peer, err)
	}
	r.enter(c.flow.Conn) // the place is free, and this may take a second
	drain(c)
	return true
}

// begin makes the session the active one. One that has failed and is still being freed
// is waited for: its source may try again as soon as it knows.
func (r *Receiver) begin(ctx context.Context, h hello, c *conn) (*session, error) {
	r.sessionMu.Lock()
	defer r.sessionMu.Unlock()
	for a := r.active; a != nil; a = r.active {
		if !isClosed(a.aborted) {
			if subtle.ConstantTimeCompare(a.id[:], h.previous[:]) != 1 || a.conn.from != c.from {
				break
			}
			a.cancel(errAnew)
		}
		r.sessionMu.Unlock()
		t := time.NewTimer(aliveSpan(h.alive))
		select {
		case <-a.gone:
		case <-ctx.Done():
		case <-t.C:
			c.writeAlive(false)
		}
		t.Stop()
		r.sessionMu.Lock()
		if ctx.Err() != nil {
			return nil, errEnding
		}
	}
	switch {
	case r.taken:
		return nil, openly("a guest has arrived here already")
	case r.active != nil:
		return nil, openly("another migration to this destination is under way")
	case r.verdicts.knows(h.session):
		return nil, fmt.Errorf("%w: session %v has been used before", ErrProtocol, h.session)
	}
	s := newSession(ctx, h.session, c, int(h.granted()), r.timeout)
	r.active = s
	return s, nil
}

// join makes c a data channel of the session that it names.
func (r *Receiver) join(h hello, c *conn) (*inlet, error) {
	s, err := r.named(h, c)
	if err != nil {
		return nil, err
	}
	return s.join(int(h.channel), c)
}

// follow makes c the next connection of a data channel.
func (r *Receiver) follow(h hello, c *conn) (*inlet, error) {
	s, err := r.named(h, c)
	if err != nil {
		return nil, err
	}
	return s.follow(int(h.channel), c)
}

// named finds the session of a data connection: the migration under way, if the peer
// knows its nonce and has its certificate.
func (r *Receiver) named(h hello, c *conn) (*session, error) {
	r.sessionMu.Lock()
	s := r.active
	r.sessionMu.Unlock()
	if s == nil || subtle.ConstantTimeCompare(s.id[:], h.session[:]) != 1 {
		return nil, fmt.Errorf("%w: data channel %d of a session that is not under way", ErrProtocol, h.channel)
	}
	if s.conn.from != c.from {
		return nil, fmt.Errorf("%w: data channel %d: %w", ErrProtocol, h.channel, errOtherPeer)
	}
	return s, nil
}

// end allows the next migration, unless this one completed.
func (r *Receiver) end(s *session, arrived bool) {
	r.sessionMu.Lock()
	defer r.sessionMu.Unlock()
	r.active = nil
	r.taken = arrived
	if arrived {
		r.tail = s.later()
	}
	if s.wasPrepared {
		r.verdicts.keep(s.id, s.conn.from, arrived)
	}
	close(s.gone)
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// errOtherPeer is why a connection does not belong to the session that it names.
var errOtherPeer = openly("its certificate is not that of the session's control connection")

// answer answers a query, unless another peer than the session's asks.
func (r *Receiver) answer(ctx context.Context, c *conn, id sessionID) error {
	r.sessionMu.Lock()
	s := r.active
	verdict, err := r.verdicts.of(id, c.from)
	r.sessionMu.Unlock()
	if s != nil && subtle.ConstantTimeCompare(s.id[:], id[:]) == 1 {
		if s.conn.from != c.from {
			return errOtherPeer
		}
		verdict = s.queried(ctx)
	}
	if err != nil {
		return err
	}
	_ = c.writeControl(frameVerdict, verdictMsg{verdict}) // the source will ask again
	return nil
}

// Progress returns a snapshot.
func (r *Receiver) Progress() ReceiveProgress {
	r.sessionMu.Lock()
	defer r.sessionMu.Unlock()
	if r.active == nil {
		return ReceiveProgress{}
	}
	p := ReceiveProgress{Active: true, Peer: r.active.conn.RemoteAddr().String(), BytesReceived: r.active.received()}
	p.Pass, p.PassedBytes, p.PassBytes = r.active.passing()
	return p
}
