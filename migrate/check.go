package migrate

import (
	"context"
	"errors"
	"time"
)

// CheckResult says whether a destination would take a guest.
type CheckResult struct {
	Address  string   `json:"address"`
	Possible bool     `json:"possible"`
	Reasons  []string `json:"reasons,omitempty"` // all that was found to be in the way, each one line
	Reason   Reason   `json:"reason,omitempty"`  // the first of them, in a word
	Version  int      `json:"version,omitempty"` // of the protocol, that both sides speak; 0: they did not get so far
	TLS      bool     `json:"tls"`
	RTT      float64  `json:"rtt_ms"`
	Channels int      `json:"channels"`
	RAMBytes uint64   `json:"ram_bytes"`
}

// errChecked is what the destination reads at the end of a check.
var errChecked = errors.New("the source has only asked whether the guest could come (migrate --check)")

// Check asks the [Receiver] at address whether it would take src: it connects as a migration
// does, and has the destination build the machine. Nothing of the guest is sent, the guest
// does not notice, and the receiver goes on waiting.
func Check(ctx context.Context, src Source, address string, opt Options) CheckResult {
	m := New(src, address, opt)
	r := CheckResult{Address: address, TLS: opt.TLS != nil}
	err := m.opt.Validate()
	if err == nil {
		ctx, cancel := context.WithTimeoutCause(ctx, m.opt.Timeout, ErrTimeout)
		defer cancel()
		err = m.check(ctx, &r)
	}
	r.Possible = err == nil
	if err != nil {
		r.Reason = reasonFor(err, m.meter.snapshot().Phase)
		var refused *RefusedError
		if errors.As(err, &refused) {
			r.Reasons = refused.Reasons
		} else {
			r.Reasons = listOf(err)
		}
	}
	r.RAMBytes = m.meter.snapshot().RAMBytes
	return r
}

// check is the beginning of [Migration.run].
func (m *Migration) check(ctx context.Context, r *CheckResult) error {
	l, err := m.connect(ctx)
	if err != nil {
		return err
	}
	defer l.close()
	r.Version, r.RTT, r.Channels = int(Version), float64(l.rtt)/float64(time.Millisecond), len(l.data)
	if err := m.setup(l.ctx, l); err != nil {
		return l.end(err)
	}
	l.conn.writeLast(frameAbort, reason{errChecked.Error()}, endGrace)
	// Until the destination has read that, it takes no other migration. It answers when it has.
	select {
	case <-l.ctx.Done():
	case <-time.After(endGrace):
	}
	return nil
}
