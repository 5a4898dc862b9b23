package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/api"
	"github.com/govmm/govmm/vmm/memory"
	"github.com/spf13/cobra"
)

func newDemo() *cobra.Command {
	var secure bool
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Watch a guest move to another process while it writes memory",
		Long: `Watch a guest move to another process while it writes memory.

The demo starts govmm run and govmm receive, migrates the guest from one to the
other over TCP on this host (--tls: encrypted), and waits until the guest has checked every page of
its memory at the destination. The last line is bad=0 if no page was lost.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// startChild needs it.
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
			defer stop()
			if err := demo(ctx, cmd.OutOrStdout(), secure); err != nil {
				return fmt.Errorf("demo: %w", err)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&secure, "tls", false, "migrate by TLS, with certificates that are made for the demo")
	return cmd
}

// How long each part of the demo may take.
const (
	demoStart   = time.Minute      // until a child listens, or its guest has filled its memory
	demoTick    = 30 * time.Second // between two ticks
	demoMigrate = 2 * time.Minute
)

// demoSize is a guest that fits the machine.
type demoSize struct {
	memory, fill, dirty string
}

// need is how many bytes the guest takes at the source and at the destination
// together, with some for the processes.
func (d demoSize) need() uint64 {
	n, _ := units.ParseBytes(d.memory) // a constant
	return 2*n + 256<<20
}

func demo(ctx context.Context, out io.Writer, secure bool) error {
	size, err := pickDemoSize()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "govmm-demo-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	var tls demoTLS
	if secure {
		if tls, err = newDemoTLS(dir); err != nil {
			return err
		}
	}
	s := &stage{ctx: ctx, out: out, events: make(chan event, 64)}
	defer s.close()

	_, _ = fmt.Fprintf(out, "A guest with 2 vCPUs and %s of memory owns %s of it, rewrites %s flat out, and checks all of it\n"+
		"once a second. It moves to another process while it does so.\n\n", size.memory, size.fill, size.dirty)
	source, destination, addr, err := s.open(dir, size, tls)
	if err != nil {
		return err
	}
	owned, before, err := s.fill(source)
	if err != nil {
		return err
	}
	res, err := s.migrate(source, addr, tls)
	if err != nil {
		return err
	}
	after, err := s.verify(destination, owned)
	if err != nil {
		return err
	}
	if err := s.stop(destination); err != nil {
		return err
	}
	return s.report(res, owned, before, after)
}

// pickDemoSize chooses the largest guest for which there is memory.
func pickDemoSize() (demoSize, error) {
	free, err := memory.Available(memory.DefaultBacking)
	if err != nil {
		return demoSize{}, err
	}
	sizes := []demoSize{{"512M", "400M", "64M"}, {"256M", "180M", "32M"}, {"128M", "80M", "16M"}}
	for _, size := range sizes {
		if size.need() <= free {
			return size, nil
		}
	}
	smallest := sizes[len(sizes)-1]
	return demoSize{}, fmt.Errorf("two processes with a guest of %s need %s of free memory, found %s", smallest.memory, units.Bytes(smallest.need()), units.Bytes(free))
}

// open starts the receiver and the guest.
func (s *stage) open(dir string, size demoSize, tls demoTLS) (source, destination *child, addr string, err error) {
	destination, err = s.start("destination", filepath.Join(dir, "destination.sock"),
		"receive", "demo", "--listen", "127.0.0.1:0", "--serial", "stdio", "--tls-dir", tls.destination)
	if err != nil {
		return nil, nil, "", err
	}
	err = s.await("the receiver's address", demoStart, nil, func(e event) bool {
		var found bool
		_, addr, found = strings.Cut(e.text, "listening on ")
		return e.ours && found
	})
	if err != nil {
		return nil, nil, "", err
	}
	addr, _, _ = strings.Cut(addr, " ")
	source, err = s.start("source", filepath.Join(dir, "source.sock"),
		"run", "demo", "--cpus", "2", "--memory", size.memory, "--serial", "stdio",
		"--cmdline", fmt.Sprintf("fill=%s dirty=%s rate=0 verify=1 tick=1", size.fill, size.dirty))
	return source, destination, addr, err
}

// fill waits until the guest owns its memory and has ticked since; it returns
// how many pages that is.
func (s *stage) fill(source *child) (owned uint64, t tick, err error) {
	err = s.await("the guest's memory", demoStart, nil, func(e event) bool {
		n, err := fmt.Sscanf(e.text, "filled %d pages", &owned)
		return !e.ours && n == 1 && err == nil
	})
	if err != nil {
		return 0, tick{}, err
	}
	for range 2 {
		if t, err = s.tick(source); err != nil {
			return 0, tick{}, err
		}
	}
	return owned, t, nil
}

// tick waits for the next tick at a child.
func (s *stage) tick(at *child) (t tick, err error) {
	err = s.await("a tick at the "+at.name, demoTick, nil, func(e event) bool {
		var ok bool
		t, ok = parseTick(e.text)
		return ok && !e.ours && e.from == at
	})
	return t, err
}

// migrate moves the guest and waits until the source's process has ended.
func (s *stage) migrate(source *child, addr string, tls demoTLS) (migrate.Result, error) {
	ctx, cancel := context.WithCancel(s.ctx)
	var v outcome
	over := make(chan struct{})
	defer func() { cancel(); <-over }()
	go func() {
		defer close(over)
		v.res, v.err = api.Open(source.socket).Migrate(ctx, api.MigrateRequest{To: addr, TLS: tls.source, AutoConverge: true}, nil)
	}()
	gone := false
	sourceEnds := func(e event) bool {
		gone = gone || e.exit && e.from == source
		return gone
	}
	if err := s.await("the migration's end", demoMigrate, over, sourceEnds); err != nil {
		return migrate.Result{}, err
	}
	<-over // the result has come, or the source has ended without sending it
	if v.err != nil {
		return migrate.Result{}, v.err
	}
	if v.res.Status != "completed" {
		return migrate.Result{}, fmt.Errorf("the migration %s: %s", v.res.Status, v.res.Error)
	}
	if !gone {
		if err := s.await("the end of the source", demoTick, nil, sourceEnds); err != nil {
			return migrate.Result{}, err
		}
	}
	if state := source.cmd.ProcessState; !state.Success() {
		return migrate.Result{}, fmt.Errorf("the source ended with %v", state)
	}
	return v.res, nil
}

// arrival is what the guest's ticks at the destination say.
type arrival struct {
	gap      float64 // the longest pause between two writes in the second of the migration, by the guest's clock, ms
	writes   uint64
	verified uint64 // pages checked since its first tick there
	ticks    int
}

// verify waits until the guest has checked, after it arrived, twice as many pages
// as it owns. Each vCPU checks its share of them in turn; so every page has then
// been checked at least once.
func (s *stage) verify(destination *child, owned uint64) (arrival, error) {
	first, err := s.tick(destination)
	if err != nil {
		return arrival{}, err
	}
	a := arrival{gap: first.gap, ticks: 1}
	last := first
	for limit := time.Now().Add(demoMigrate); last.verified-first.verified < 2*owned || last.writes == first.writes; {
		if time.Now().After(limit) {
			return a, fmt.Errorf("the guest checked %d of %d pages within %v", last.verified-first.verified, owned, demoMigrate)
		}
		if last, err = s.tick(destination); err != nil {
			return a, err
		}
		a.ticks++
	}
	a.verified, a.writes = last.verified-first.verified, last.writes-first.writes
	return a, nil
}

// stop ends the guest and waits for its process.
func (s *stage) stop(c *child) error {
	if _, err := api.Open(c.socket).Stop(s.ctx); err != nil {
		return err
	}
	return s.await("the end of the "+c.name, demoTick, nil, func(e event) bool { return e.exit && e.from == c })
}

// report prints what the migration took.
func (s *stage) report(res migrate.Result, owned uint64, before tick, after arrival) error {
	_, _ = fmt.Fprintln(s.out)
	if err := printResult(s.out, res); err != nil {
		return err
	}
	_, _ = fmt.Fprintln(s.out)
	w := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	row := func(key, format string, args ...any) { _, _ = fmt.Fprintf(w, key+"\t"+format+"\n", args...) }
	row("pages owned by the guest", "%d", owned)
	row("pages written before the migration", "%d", before.writes)
	row("pages written at the destination", "%d in %d ticks", after.writes, after.ticks)
	row("pages checked at the destination", "%d", after.verified)
	row("longest pause in its writes, that second", "%s", formatMS(time.Duration(after.gap*float64(time.Millisecond))))
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(s.out, "bad=%d\n", s.bad)
	return err
}
