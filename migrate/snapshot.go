package migrate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/govmm/govmm/internal/unixsock"
	"github.com/govmm/govmm/mempage"
)

// A snapshot is a precopy whose destination keeps what it is sent, in a file, and does not
// run it. The exchange is that of a migration as far as PREPARED, under a feature of its
// own, so that no host that would run the guest takes it. Then the guest goes on here, and
// COMMIT asks for no more than that what was sent is kept: the destination starts nothing,
// and says RUNNING when all of it is durable. There is no question of who may run the
// guest: it is the source, unless RUNNING has come and the guest was to end with it. So
// the source asks for no verdict, and when the answer is lost its guest goes on.

// Snapshot are the options of a migration to a receiver that keeps the guest
// ([NewKeeper]), see [Options].
type Snapshot struct {
	// Stop lets the guest stand still until all is kept; it then ends here. Otherwise it
	// goes on as soon as its state and last pages have been received.
	Stop bool
	// Patience is how long the guest may stand still before the stop is undone, if that is
	// more than a migration allows: to copy disks takes long.
	Patience time.Duration
}

func (s *Snapshot) validate(o Options) error {
	switch {
	case s.Patience < 0:
		return fmt.Errorf("snapshot: patience %v: must not be negative", s.Patience)
	case o.SharedMemory:
		return errors.New("snapshot: memory that is shared is not kept")
	case o.VerifyPages:
		return errors.New("snapshot: pages cannot be verified: there is no memory at the destination")
	}
	return nil
}

// PageWriter is a [Target] without memory: what lands is handed to it. Of the methods of
// [RAM] all but Bytes are called.
type PageWriter interface {
	// WritePages stores the pages whose bits are set in data; span is memory of the engine
	// with all pages of the span, of which these have content. Pages of different spans are
	// written at the same time.
	WritePages(slot int, first uint64, span []byte, data []uint64) error
}

// NewKeeper returns a receiver that takes snapshots, and nothing else: the targets of b
// keep a guest where others start it.
func NewKeeper(b Builder) *Receiver {
	r := NewReceiver(b, nil)
	r.keeps, r.known = true, append(slices.Clone(knownFeatures), featureSnapshot)
	return r
}

// TrustUser lets processes of a user connect by a unix socket, beside those of this
// process's user and root: a VM may run as another one. It is called before Serve.
func (r *Receiver) TrustUser(uid int) { r.user = uid }

// checkPeer is checkUnixPeer, but for TrustUser.
func (r *Receiver) checkPeer(c net.Conn) error {
	if u, ok := c.(*net.UnixConn); ok && r.user != 0 {
		if cred, err := unixsock.Peer(u); err == nil && int(cred.Uid) == r.user {
			return nil
		}
	}
	return checkUnixPeer(c)
}

// checkKeeps refuses what a keeper would not keep.
func (r *Receiver) checkKeeps(used []string) error {
	if r.keeps && !slices.Contains(used, featureSnapshot) {
		return openly("expected a snapshot, found a guest that is to run here")
	}
	return nil
}

// keep ends a snapshot whose destination is PREPARED. The guest stands still here.
func (m *Migration) keep(base context.Context, p *precopy) (err error) {
	l := p.link
	stop := m.opt.Snapshot.Stop
	if !stop {
		if err := m.takeBack(base, p); err != nil {
			return l.end(err)
		}
	}
	took, parts := p.watch.finish()
	m.meter.update(func(mt *meter) {
		if !p.wasPaused {
			mt.result.Downtime, mt.result.DowntimeParts, mt.result.DowntimeNote = took, parts, p.expected.note(took, parts)
		}
	})
	m.setPhase(PhaseSaving)
	// Cancel is possible to the end: the guest is here.
	if err = m.awaitKept(p); err != nil {
		err = fmt.Errorf("the snapshot was not kept, and the guest goes on here: %w", l.end(l.explain(err)))
		if stop {
			err = errors.Join(err, m.takeBack(base, p))
		}
		return err
	}
	l.close()
	if stop {
		p.hints.finish(false)
	}
	m.meter.update(func(mt *meter) { mt.result.Total = time.Since(mt.started) })
	return nil
}

// awaitKept asks the destination to keep what it has, and waits for as long as it lives.
func (m *Migration) awaitKept(p *precopy) error {
	if err := p.link.conn.writeFrame(header{typ: frameCommit, first: p.stops}); err != nil {
		return err
	}
	_, err := p.link.await(p.link.ctx, frameRunning)
	return err
}

// write is apply for a target without memory.
func (in *inlet) write(w PageWriter, f header, pages, length int) error {
	if in.staging == nil {
		in.staging = make([]byte, maxSpan*mempage.Size)
	}
	span, words := in.staging[:int(f.count)*mempage.Size], in.meta.data[:spanWords(f.count)]
	var err error
	if f.typ == framePacked {
		err = in.unpack(f, span, length, pages)
	} else if pages > 0 {
		in.iov = in.iov[:0]
		forRuns(words, func(start, end int) { in.iov = append(in.iov, span[start*mempage.Size:end*mempage.Size]) })
		err = in.conn.readv(in.iov)
	}
	if err == nil && pages > 0 {
		err = w.WritePages(int(f.slot), f.first, span, words)
	}
	if err != nil {
		return err
	}
	// What follows is applyZero: what may have been stored before is made a hole.
	zero := in.meta.zero[:len(words)]
	if !slices.ContainsFunc(zero, func(w uint64) bool { return w != 0 }) {
		return nil
	}
	target := in.session.machine()
	if err := target.Populated(int(f.slot), f.first, uint64(f.count), words); err != nil {
		return err
	}
	for i := range zero {
		zero[i] &= words[i]
	}
	forRuns(zero, func(start, end int) {
		if err == nil {
			err = target.Zero(int(f.slot), f.first+uint64(start), uint64(end-start))
		}
	})
	return err
}
