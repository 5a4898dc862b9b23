package migrate_test

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/boundedlog"
	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/simtest"
)

// TestCheck: a check finds what a migration would find before the first page, moves nothing,
// is no failure at the destination, and leaves it ready for the migration itself.
func TestCheck(t *testing.T) {
	w := simtest.NewWorld()
	defer w.Close()
	m, err := simtest.NewMachine(w, simtest.Config{Layout: simtest.Layout{Slots: []migrate.Slot{{Pages: 64}}}, CPUs: 1, Seed: 1, Dirty: 8, Rate: 100})
	testenv.Check(t, err)
	testenv.Check(t, m.Resume())
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	testenv.Check(t, err)
	at := ln.Addr().String()
	if r := migrate.Check(t.Context(), m, nobody(t), migrate.Options{}); r.Possible || r.Reason != "unreachable" || len(r.Reasons) != 1 {
		t.Errorf("nobody listens: %+v", r)
	}
	ctx, stop := context.WithCancel(t.Context())
	var log bytes.Buffer
	logger := boundedlog.New(slog.New(slog.NewTextHandler(&log, nil)))
	r := migrate.NewReceiver(&simtest.Builder{World: w}, logger)
	served := make(chan error, 1)
	go func() { served <- r.Serve(ctx, ln) }()
	for range 3 {
		if r := migrate.Check(ctx, m, at, migrate.Options{}); !r.Possible || r.Version == 0 || r.Channels == 0 || r.RAMBytes != 64<<12 || len(r.Reasons) != 0 {
			t.Errorf("expected that it is possible: %+v", r)
		}
	}
	if r := migrate.Check(ctx, m, at, migrate.Options{Timeout: -time.Second}); r.Possible || len(r.Reasons) != 1 {
		t.Errorf("options that are wrong: %+v", r)
	}
	if !m.Running() || w.Arrivals() != 0 {
		t.Errorf("the guest runs: %t; %d arrivals", m.Running(), w.Arrivals())
	}
	_, err = migrate.New(m, at, migrate.Options{}).Run(ctx)
	testenv.Check(t, err)
	<-r.Arrived()
	stop()
	testenv.Check(t, <-served)
	boundedlog.Flush(t.Context(), logger)
	if s := log.String(); strings.Contains(s, "fail") || strings.Contains(s, "refused") || !strings.Contains(s, "a source has asked whether its guest could come") {
		t.Errorf("the receiver said\n%s", s)
	}
}

// TestCheckRefused: what is in the way is said, and what mends it.
func TestCheckRefused(t *testing.T) {
	w := simtest.NewWorld()
	defer w.Close()
	m, err := simtest.NewMachine(w, simtest.Config{Layout: simtest.Layout{Slots: []migrate.Slot{{Pages: 64}}}, CPUs: 1, Disks: []uint64{1 << 20}})
	testenv.Check(t, err)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	testenv.Check(t, err)
	ctx, stop := context.WithCancel(t.Context())
	r := migrate.NewReceiver(&simtest.Builder{World: w}, nil)
	served := make(chan error, 1)
	go func() { served <- r.Serve(ctx, ln) }()
	got := migrate.Check(ctx, m, ln.Addr().String(), migrate.Options{})
	if got.Possible || got.Reason != "refused" || len(got.Reasons) != 1 || !strings.Contains(got.Reasons[0], "--copy-disks") {
		t.Errorf("%+v", got)
	}
	if got := migrate.Check(ctx, m, ln.Addr().String(), migrate.Options{CopyDisks: true}); !got.Possible {
		t.Errorf("with what was asked for: %+v", got)
	}
	stop()
	testenv.Check(t, <-served)
}

// nobody is an address at which nobody listens.
func nobody(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	testenv.Check(t, err)
	defer ln.Close()
	return ln.Addr().String()
}
