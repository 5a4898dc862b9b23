package migrate_test

import (
	"context"
	"net"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/govmm/govmm/internal/testcert"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/simtest"
)

// moveOverTLS migrates a busy guest whose keys are good for so many bytes at each side.
// It returns how many connections the source made, and how many of them came to their end.
func moveOverTLS(t *testing.T, here, there uint64, opt migrate.Options) (dialled int64, result migrate.Result, err error) {
	ca := testcert.NewCA(t, "the CA")
	w := simtest.NewWorld()
	defer w.Close()
	m, err := simtest.NewMachine(w, simtest.Config{Layout: simtest.Layout{Slots: []migrate.Slot{{Pages: 16 << 10}}, ManualProtect: true},
		CPUs: 1, Seed: 1, Dirty: 50, Devices: 20, Fill: 16 << 10})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := migrate.NewReceiver(&simtest.Builder{World: w}, nil)
	r.LimitKeys(there)
	if err := r.RequireTLS(ca.Server(ca.Issue(t, "destination"))); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- r.Serve(ctx, ln) }()
	var n atomic.Int64
	opt.VerifyPages = true
	opt.TLS = ca.Client(ca.Issue(t, "source"), "destination")
	opt.Dial = func(ctx context.Context, address string) (net.Conn, error) {
		n.Add(1)
		return new(net.Dialer).DialContext(ctx, "tcp", address)
	}
	mig := migrate.New(m, ln.Addr().String(), opt)
	mig.LimitKeys(here)
	result, err = mig.Run(ctx)
	if err == nil {
		<-r.Arrived()
	}
	stop()
	if serr := <-served; serr != nil {
		t.Error(serr)
	}
	if werr := w.Err(); werr != nil || w.Arrivals() == 1 != (err == nil) || m.Running() == (err == nil) {
		t.Errorf("%v, %d arrivals, runs at the source: %v, after %v", werr, w.Arrivals(), m.Running(), err)
	}
	return n.Load(), result, err
}

// A migration of 64 MiB whose keys are good for 6 MiB goes on with ever new keys, and every
// page is what it was.
func TestKeysAreRenewed(t *testing.T) {
	const limit = 6 << 20
	for _, channels := range []int{1, 2} {
		dialled, result, err := moveOverTLS(t, limit, limit, migrate.Options{Channels: channels})
		if err != nil {
			t.Fatal(err)
		}
		if least := int64(result.BytesSent/limit) + 1; result.BytesSent < 64<<20 || dialled < least {
			t.Errorf("%d channels: %d bytes by %d connections, expected at least %d", channels, result.BytesSent, dialled, least)
		}
		var sum uint64
		for _, n := range result.ChannelBytes {
			sum += n
		}
		if sum > result.BytesSent || sum < result.BytesSent*9/10 {
			t.Errorf("%d channels: %d of %d bytes by them: %d", channels, sum, result.BytesSent, result.ChannelBytes)
		}
	}
}

// What would go beyond the limit is neither sent nor taken: a frame that is longer than
// that, and a peer with another limit.
func TestNoKeyIsUsedForMore(t *testing.T) {
	_, _, err := moveOverTLS(t, 1<<20, 1<<20, migrate.Options{Channels: 1})
	if err == nil || !strings.Contains(err.Error(), "would be sent under one key") {
		t.Errorf("a source: %v", err)
	}
	_, _, err = moveOverTLS(t, 64<<30, 6<<20, migrate.Options{Channels: 1})
	if err == nil || !strings.Contains(err.Error(), "the peer sent more than 6291456 bytes under one key") {
		t.Errorf("a destination: %v", err)
	}
}
