package migrate_test

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testcert"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/simtest"
	"pgregory.net/rapid"
)

// jitter is a network in which every connection has its own pace, so that channels
// overtake each other. After cutAt bytes of all connections together, the one that
// carried the last byte is cut; 0: none is.
type jitter struct {
	ln    net.Listener
	to    string
	seed  uint64
	mu    sync.Mutex // guards all below
	conns uint64
	past  int
	cutAt int
	all   sync.WaitGroup
}

func newJitter(to string, seed uint64, cutAt int) (*jitter, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	j := &jitter{ln: ln, to: to, seed: seed, cutAt: cutAt}
	j.all.Go(func() {
		for {
			a, err := ln.Accept()
			if err != nil {
				return
			}
			j.all.Go(func() { j.serve(a) })
		}
	})
	return j, nil
}

func (j *jitter) close() {
	j.ln.Close()
	j.all.Wait()
}

func (j *jitter) serve(a net.Conn) {
	defer a.Close()
	b, err := net.Dial("tcp", j.to)
	if err != nil {
		return
	}
	defer b.Close()
	j.mu.Lock()
	j.conns++
	random := rand.New(rand.NewPCG(j.seed, j.conns))
	j.mu.Unlock()
	j.all.Go(func() {
		_, _ = io.Copy(a, b)
		a.Close()
	})
	defer b.Close()
	buf := make([]byte, 1+random.IntN(200<<10))
	pace := time.Duration(random.IntN(300)) * time.Microsecond
	for {
		n, err := a.Read(buf)
		if err != nil {
			return
		}
		if random.IntN(4) == 0 {
			time.Sleep(pace)
		}
		j.mu.Lock()
		j.past += n
		cut := j.cutAt > 0 && j.past >= j.cutAt
		if cut {
			j.cutAt = 0
		}
		j.mu.Unlock()
		if cut {
			n = random.IntN(n)
		}
		if _, err := b.Write(buf[:n]); err != nil || cut {
			return
		}
	}
}

// For any number of channels, any compression, plain and over TLS, whose keys are renewed
// again and again, any order of arrival and any place of a cut: the guest, which writes all the time, is on one side, and every page of it has
// what was written last.
func TestChannelsLoseNoPage(t *testing.T) {
	ca := testcert.NewCA(t, "the CA")
	server, client := ca.Server(ca.Issue(t, "destination")), ca.Client(ca.Issue(t, "source"), "destination")
	rapid.Check(t, func(t *rapid.T) {
		slots := []migrate.Slot{{Pages: rapid.Uint64Range(1, 3000).Draw(t, "pages")}}
		if rapid.Bool().Draw(t, "two slots") {
			slots = append(slots, migrate.Slot{GPA: 4 << 30, Pages: rapid.Uint64Range(1, 1500).Draw(t, "more pages")})
		}
		manual := rapid.Bool().Draw(t, "manual protect")
		w := simtest.NewWorld()
		defer w.Close()
		m, err := simtest.NewMachine(w, simtest.Config{
			Layout: simtest.Layout{Slots: slots, ManualProtect: manual,
				InitiallySet: manual && rapid.Bool().Draw(t, "initially set"), HolesUnknown: rapid.Bool().Draw(t, "holes unknown")},
			CPUs: 2, Seed: rapid.Uint64().Draw(t, "seed"), Dirty: rapid.Uint64Range(1, 200).Draw(t, "dirty"),
			Devices: 100, Punches: 30, KernelWrites: 50, Fill: rapid.Uint64Range(0, 2000).Draw(t, "fill"),
		})
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
		secure, keyLimit := rapid.Bool().Draw(t, "TLS"), rapid.Uint64Range(5<<20, 20<<20).Draw(t, "key limit")
		if secure {
			r.LimitKeys(keyLimit)
			if err := r.RequireTLS(server); err != nil {
				t.Fatal(err)
			}
		}
		ctx, stop := context.WithCancel(context.Background())
		served := make(chan error, 1)
		go func() { served <- r.Serve(ctx, ln) }()
		cutAt := 0
		if rapid.Bool().Draw(t, "cut") {
			cutAt = rapid.IntRange(1, 12<<20).Draw(t, "cut at")
		}
		j, err := newJitter(ln.Addr().String(), rapid.Uint64().Draw(t, "network"), cutAt)
		if err != nil {
			t.Fatal(err)
		}
		opt := migrate.DefaultOptions()
		opt.Channels = rapid.IntRange(1, 5).Draw(t, "channels")
		opt.Compression = rapid.SampledFrom([]migrate.Compression{
			migrate.CompressNone, migrate.CompressZstd, migrate.CompressLZ4}).Draw(t, "compression")
		opt.VerifyPages = rapid.Bool().Draw(t, "verify")
		opt.MaxRounds = 12
		if secure {
			opt.TLS = client
		}
		mig := migrate.New(m, j.ln.Addr().String(), opt)
		if secure {
			mig.LimitKeys(keyLimit)
		}
		_, err = mig.Run(ctx)
		if err == nil {
			<-r.Arrived()
		}
		stop()
		if serr := <-served; serr != nil {
			t.Fatal(serr)
		}
		j.close()
		if w.Arrivals() == 1 != (err == nil) {
			t.Fatalf("%d arrivals after %v", w.Arrivals(), err)
		}
		if err != nil && cutAt == 0 && !errors.Is(err, migrate.ErrNotConverged) {
			t.Fatal(err)
		}
		if err != nil && !m.Running() {
			t.Fatalf("the guest does not run on after %v", err)
		}
		if err := w.Err(); err != nil {
			t.Fatal(err)
		}
	})
}
