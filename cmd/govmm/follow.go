package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/api"
)

// unknownPatience is how long a migration may stay in handoff-unknown before its
// follower leaves: the VM goes on asking the destination, which may take days.
const unknownPatience = 10 * time.Second

var (
	errHandoffUnknown = errors.New("handoff-unknown: the guest was handed over to the destination and the answer is lost, so it stays paused here; " +
		"govmm goes on asking, and resumes the guest if it does not run there; if the destination is gone for good, " + forceAdvice)
	errLeft = errors.New("left; the migration goes on: see govmm info, or end it with govmm migrate --cancel")
	errDied = errors.New("the VM's process ended during the migration; if the guest had been handed over it runs at the destination")
)

// follower waits for the end of a migration: it draws its progress, cancels on
// the first signal and leaves on the second.
type follower struct {
	client  *api.Client
	signals <-chan os.Signal
	stderr  io.Writer
	line    *progressLine
	// patience is how long the phase may be handoff-unknown; see
	// unknownPatience.
	patience time.Duration

	interrupted bool // a signal came
}

// outcome is what a stream of progress ended with.
type outcome struct {
	res migrate.Result
	err error
}

// follow runs open, which streams a migration's progress, to its end. After an
// error the result is made of the last progress.
func (f *follower) follow(ctx context.Context, open func(context.Context, func(migrate.Progress)) (migrate.Result, error)) (migrate.Result, error) {
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	updates, end := make(chan migrate.Progress), make(chan outcome, 1)
	go func() {
		res, err := open(ctx, func(p migrate.Progress) {
			select {
			case updates <- p:
			case <-ctx.Done():
			}
		})
		end <- outcome{res, err}
	}()
	defer f.line.clear()

	var last migrate.Progress
	var unknown <-chan time.Time // runs while the phase is handoff-unknown
	for {
		select {
		case p := <-updates:
			if (p.Phase == migrate.PhaseHandoffUnknown) != (unknown != nil) {
				unknown = nil
				if p.Phase == migrate.PhaseHandoffUnknown {
					unknown = time.After(f.patience)
				}
			}
			f.line.draw(p)
			if f.interrupted && last.Phase == "" {
				f.cancel(ctx) // the signal came before the migration began
			}
			last = p
		case v := <-end:
			if errors.Is(v.err, api.ErrLost) && last.Phase != "" {
				v.err = errDied
			}
			if v.err != nil {
				return seen(last), advise(v.err)
			}
			return v.res, nil
		case <-unknown:
			return seen(last), errHandoffUnknown
		case <-f.signals:
			if f.interrupted {
				return seen(last), errLeft
			}
			f.interrupted = true
			if last.Phase != "" {
				f.cancel(ctx)
			}
		}
	}
}

// cancel asks the VM to cancel; the result comes with the stream.
func (f *follower) cancel(ctx context.Context) {
	f.line.clear()
	if err := f.client.Cancel(ctx); err != nil {
		_, _ = fmt.Fprintf(f.stderr, "govmm: cancel: %v; a second Ctrl-C leaves, and the migration goes on\n", err)
		return
	}
	_, _ = fmt.Fprintln(f.stderr, "govmm: cancelling")
}

// seen makes a result of the last progress, for a migration whose result is not
// known.
func seen(p migrate.Progress) migrate.Result {
	return migrate.Result{Status: "failed", Total: p.Elapsed, BytesSent: p.BytesSent, RAMBytes: p.RAMBytes}
}
