package migrate

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// A probe measures the link to a receiver. The source opens connections with purpose
// 4 and sends PROBE frames, which the receiver reads into fresh memory, as in a
// migration, and throws away. It echoes ROUND, as in a migration.

const (
	maxProbeFrame = 1 << 20 // bytes of one PROBE frame
	maxProbeBytes = 1 << 30 // bytes of one connection, after which it is closed
	// maxProbes bounds how many probes a receiver serves at one time.
	maxProbes = 4
	// maxProbeTime bounds a probe as a whole.
	maxProbeTime = 30 * time.Second

	// probeTime and probeBytes bound what the source sends to measure the link, after
	// batches from probeFirst to probeWarm with which the connection gets up to speed.
	probeTime  = 400 * time.Millisecond
	probeBytes = 256 << 20
	probeFirst = 16 << 10
	probeWarm  = 8 << 20
)

// linkSpeed is the result of a probe.
type linkSpeed struct {
	bandwidth float64 // bytes a second, from memory to memory
	rtt       time.Duration
}

// probeLinks measures the link by as many connections as a migration would have.
func probeLinks(ctx context.Context, d *dialer, n int) (all linkSpeed, err error) {
	var probers []*prober
	defer func() {
		for _, p := range probers {
			p.link.close()
		}
	}()
	for range min(n, maxProbes) {
		p, err := openProbe(ctx, d)
		if err != nil {
			return all, fmt.Errorf("probe %s: %w", d.address, err)
		}
		probers = append(probers, p)
		all.rtt = max(all.rtt, p.rtt)
	}
	each := make([]float64, len(probers))
	errs := make([]error, len(probers))
	var sending sync.WaitGroup
	for i, p := range probers {
		sending.Go(func() { each[i], errs[i] = p.measure() })
	}
	sending.Wait()
	for i, err := range errs {
		if err != nil {
			return all, fmt.Errorf("probe %s: %w", d.address, err)
		}
		all.bandwidth += each[i]
	}
	return all, nil
}

// prober is the source's end of one connection.
type prober struct {
	link    *link
	rtt     time.Duration
	timeout time.Duration
	buf     []byte
	round   uint64
}

func openProbe(ctx context.Context, d *dialer) (*prober, error) {
	id, err := newSessionID()
	if err != nil {
		return nil, err
	}
	c, err := d.connect(ctx, newHello(purposeProbe, id))
	if err != nil {
		return nil, err
	}
	p := &prober{link: newLink(ctx, c, 0), timeout: d.timeout, buf: make([]byte, maxProbeFrame)}
	asked := time.Now()
	if _, err := p.link.awaitWithin(p.link.ctx, frameHelloOK, d.timeout); err != nil {
		p.link.close()
		return nil, err
	}
	p.rtt = time.Since(asked)
	for i := range p.buf {
		p.buf[i] = byte(i>>12) | 1 // no zero page
	}
	return p, nil
}

// measure returns how many bytes a second land.
func (p *prober) measure() (bandwidth float64, err error) {
	for n := probeFirst; ; n *= 8 {
		if n > probeWarm {
			n = probeBytes
		}
		began := time.Now()
		sent, err := p.send(n, probeTime)
		if err != nil {
			return 0, p.link.explain(err)
		}
		took := time.Since(began)
		if n == probeBytes {
			return float64(sent) / max(took.Seconds(), 1e-6), nil
		}
		if took -= p.rtt; took >= probeTime/2 { // so slow a link that buffers would hold a whole batch
			return float64(sent) / took.Seconds(), nil
		}
	}
}

// send sends n bytes, but no longer than d, and returns how many have landed.
func (p *prober) send(n int, d time.Duration) (sent int, err error) {
	for began := time.Now(); sent < n && time.Since(began) < d; {
		b := p.buf[:min(n-sent, len(p.buf))]
		if err := p.link.conn.writeFrame(header{typ: frameProbe}, b); err != nil {
			return sent, err
		}
		sent += len(b)
	}
	p.round++
	if err := p.link.conn.writeFrame(header{typ: frameRound, first: p.round}); err != nil {
		return sent, err
	}
	_, err = p.link.awaitWithin(p.link.ctx, frameRound, maxProbeTime)
	return sent, err
}

// serveProbe serves a probe: a bounded number of bytes, for a bounded time.
func (r *Receiver) serveProbe(ctx context.Context, c *conn) error {
	if err := r.beginProbe(ctx); err != nil {
		return err
	}
	defer r.endProbe()
	r.newcomers.leave(c.flow.Conn)
	late := time.AfterFunc(maxProbeTime, func() { c.Close() })
	defer late.Stop()
	if err := c.writeControl(frameHelloOK, helloOK{Version: Version}); err != nil {
		return err
	}
	sink, err := newSink()
	if err != nil {
		return err
	}
	defer sink.free()
	for total := 0; ; {
		f, err := c.readHeader()
		if err != nil {
			return nil // the source has ended the probe
		}
		switch {
		case f.typ == frameProbe && f.length <= maxProbeFrame && total+int(f.length) <= maxProbeBytes:
			total += int(f.length)
			if err := c.readFull(sink.next(int(f.length))); err != nil {
				return nil
			}
		case f.typ == frameRound && f.length == 0:
			sink.warm(r.probing())
			if err := c.writeFrame(header{typ: frameRound, first: f.first}); err != nil {
				return nil
			}
		case f.typ == frameAbort:
			return nil
		default:
			return fmt.Errorf("%w: a probe sent %v of %d bytes after %d", ErrProtocol, f.typ, f.length, total)
		}
		if err := context.Cause(ctx); err != nil {
			return nil
		}
	}
}

// beginProbe admits a probe, unless it would disturb a migration. One that has failed, or was
// only asked for, and whose machine is still being freed is waited for.
func (r *Receiver) beginProbe(ctx context.Context) error {
	r.sessionMu.Lock()
	defer r.sessionMu.Unlock()
	limit := time.NewTimer(maxProbeTime)
	defer limit.Stop()
	for a := r.active; a != nil && isClosed(a.aborted) && ctx.Err() == nil; a = r.active {
		r.sessionMu.Unlock()
		select {
		case <-a.gone:
		case <-ctx.Done():
		case <-limit.C:
			r.sessionMu.Lock()
			return openly("the machine of the migration before is still being freed")
		}
		r.sessionMu.Lock()
	}
	switch {
	case r.taken:
		return openly("a guest has arrived here already")
	case r.active != nil:
		return openly("a migration to this destination is under way")
	case r.probes == maxProbes:
		return openly("%d others are probing this host", r.probes)
	}
	r.probes++
	return nil
}

// probing is the number of connections of probes that are served now.
func (r *Receiver) probing() int {
	r.sessionMu.Lock()
	defer r.sessionMu.Unlock()
	return r.probes
}

func (r *Receiver) endProbe() {
	r.sessionMu.Lock()
	defer r.sessionMu.Unlock()
	r.probes--
}

// sink is memory to receive into. It is populated like guest memory at a destination,
// which takes as long as receiving does.
type sink struct {
	mem   []byte
	at    int
	ahead *ahead
	full  [maxProbeFrame / mempage.Size / mempage.WordBits]uint64 // a frame's data pages: all
}

const sinkBytes = 32 << 20

func newSink() (*sink, error) {
	mem, err := unix.Mmap(-1, 0, sinkBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes to receive into: %w", sinkBytes, err)
	}
	_ = unix.Madvise(mem, unix.MADV_HUGEPAGE) // as for guest memory; not every kernel has it
	s := &sink{mem: mem}
	for i := range s.full {
		s.full[i] = ^uint64(0)
	}
	return s, nil
}

// warm is called when all connections of a probe are there: from now on the sink is
// populated ahead, as for one of so many channels.
func (s *sink) warm(channels int) {
	if helpers := spareProcessors(channels) / channels; s.ahead == nil && helpers > 0 {
		s.ahead = startAhead(s, 1, helpers)
	}
}

// Slots, Prefault and Zero implement [prefaulter].

func (s *sink) Slots() []Slot { return []Slot{{Pages: sinkBytes / mempage.Size}} }

func (s *sink) pages(first, n uint64) []byte {
	return s.mem[first*mempage.Size : (first+n)*mempage.Size]
}

func (s *sink) Prefault(_ int, first, n uint64) error {
	return unix.Madvise(s.pages(first, n), unix.MADV_POPULATE_WRITE)
}

func (s *sink) Zero(_ int, first, n uint64) error {
	return unix.Madvise(s.pages(first, n), unix.MADV_DONTNEED)
}

// next returns n fresh bytes, at most maxProbeFrame.
func (s *sink) next(n int) []byte {
	if n == 0 {
		return nil
	}
	if s.at+n > len(s.mem) {
		_ = s.ahead.reclaim()
		_ = unix.Madvise(s.mem, unix.MADV_DONTNEED) // otherwise the result is too good
		s.ahead.forget()
		s.at = 0
	}
	first, pages := s.at/mempage.Size, (n+mempage.Size-1)/mempage.Size
	s.ahead.span(header{first: uint64(first), count: uint32(pages)}, s.full[:], pages)
	b := s.mem[s.at : s.at+n]
	s.at += pages * mempage.Size
	return b
}

func (s *sink) free() {
	s.ahead.end()
	_ = unix.Munmap(s.mem)
}
