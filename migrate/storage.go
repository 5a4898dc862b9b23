package migrate

import (
	"context"
	"fmt"
	"slices"
)

// The guest's disks do not travel: both sides reach them. That they do is found out in
// the stop, before COMMIT: the source describes some blocks that the session's nonce
// chooses (STORAGE, before STATE), and the destination compares them while pages land.

// compareStorage uses the feature if both sides have it. Within one host the disks are the same.
func (m *Migration) compareStorage(known []string) {
	if _, ok := m.src.(Sampler); ok && m.opt.Referee == nil && slices.Contains(known, featureStorage) {
		m.features = append(m.features, featureStorage)
	}
}

// samples are what the source says of the storage. Nil samples are none.
type samples struct {
	ready   chan struct{} // closed when the rest is known
	encoded []byte
	err     error
}

// sampleStorage begins to sample, unless the destination does not compare.
func (m *Migration) sampleStorage(ctx context.Context) *samples {
	if !slices.Contains(m.features, featureStorage) {
		return nil
	}
	s := &samples{ready: make(chan struct{})}
	go func() {
		defer close(s.ready)
		s.encoded, s.err = m.src.(Sampler).SampleStorage(ctx, m.session)
		if n := len(s.encoded); s.err == nil && n > maxStorage {
			s.err = fmt.Errorf("%d bytes about the storage: must be at most %d", n, maxStorage)
		}
	}()
	return s
}

func (s *samples) wait() {
	if s != nil {
		<-s.ready
	}
}

// sendSamples sends the samples of this stop.
func (p *precopy) sendSamples() error {
	s := p.samples
	if s == nil {
		return nil
	}
	s.wait()
	if s.err != nil {
		return s.err
	}
	return p.link.conn.writeFrame(header{typ: frameStorage}, s.encoded)
}

// comparison is what the destination does with STORAGE.
type comparison struct {
	s       *session
	target  Comparer
	missing bool // STORAGE has not come
	ctx     context.Context
	cancel  context.CancelFunc
	done    chan error // has one value when begun
	begun   bool
	later   []byte // STORAGE, which is compared when the copies of disks are whole; nil: it has been, or is being compared
}

func (s *session) newComparison(ctx context.Context, target Target) *comparison {
	c := &comparison{s: s, done: make(chan error, 1), missing: slices.Contains(s.features, featureStorage)}
	c.target, _ = target.(Comparer)
	c.ctx, c.cancel = context.WithCancel(ctx)
	return c
}

// due reports whether STORAGE must come next.
func (c *comparison) due() bool { return c.missing }

// begin compares while the last pages land.
func (c *comparison) begin(samples []byte) {
	c.missing = false
	if len(c.s.copies) > 0 {
		c.later = samples
		return
	}
	c.begun = true
	go func() { c.done <- c.compare(samples) }()
}

func (c *comparison) compare(samples []byte) error {
	if c.target == nil {
		return openly("this machine has no storage to compare")
	}
	return c.target.CompareStorage(c.ctx, c.s.id, samples)
}

// whole makes the copies of disks durable, when all of them has landed, and compares them
// with the source's.
func (c *comparison) whole() error {
	if err := c.s.syncDisks(); err != nil {
		return &stepError{"make the disks durable", err}
	}
	if c.later == nil {
		return nil
	}
	defer func() { c.later = nil }()
	return c.compare(c.later)
}

// running gives the result of a comparison that has begun; nil: none has.
func (c *comparison) running() <-chan error {
	if !c.begun {
		return nil
	}
	return c.done
}

// end ends a comparison under way: the machine may be discarded then.
func (c *comparison) end() {
	c.cancel()
	if c.begun {
		<-c.done
		c.begun = false
	}
}
