package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/migrate"
)

// progressBar draws a bar of size characters and a percentage, in ASCII.
func progressBar(fraction float64, size int) string {
	fraction = min(max(fraction, 0), 1)
	full := int(fraction * float64(size))
	return fmt.Sprintf("[%s%s] %2d%%", strings.Repeat("#", full), strings.Repeat("-", size-full), int(fraction*100))
}

// fractionOf is how much of what a migration has to send, or has to send again, is there: of
// the disks while these are copied, and then of memory. It falls when a new round begins.
func fractionOf(p *migrate.Progress) float64 {
	left, all := p.RemainingBytes, p.RAMBytes
	switch p.Phase {
	case migrate.PhaseConnecting, migrate.PhaseSetup:
		return 0
	case migrate.PhaseDisks:
		left, all = p.DiskRemainingBytes, p.DiskBytes
	case migrate.PhaseSwitchover, migrate.PhaseHandoffUnknown, migrate.PhaseCompleted:
		return 1
	}
	if all == 0 {
		return 0
	}
	return 1 - float64(min(left, all))/float64(all)
}

// progressLineText is the live line of a migration, with a bar where it is known how much is
// left and if there is room for one, and otherwise with the time that has passed.
func progressLineText(p migrate.Progress, width int) string {
	const least, most = 4, 20
	text := plain(progressText(p))
	switch p.Phase {
	case migrate.PhasePrecopy, migrate.PhaseDisks, migrate.PhasePostcopy:
	default:
		if p.Elapsed >= time.Second {
			text += ", " + p.Elapsed.Round(time.Second).String()
		}
		return text
	}
	size := min(width-len(text)-len("[] 100% "), most)
	if size < least {
		return text
	}
	return progressBar(fractionOf(&p), size) + " " + text
}

const (
	// lineAfter is when a line is drawn for the first time: what is quick has none.
	lineAfter = 500 * time.Millisecond
	lineEvery = 200 * time.Millisecond
)

// during draws a line again and again until stop is called, which erases it. text makes it of
// the time that has passed.
func (l *progressLine) during(text func(time.Duration) string) (stop func()) {
	if l.out == nil {
		return func() {}
	}
	began, end, ended := time.Now(), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		defer l.clear()
		next := time.NewTimer(lineAfter)
		defer next.Stop()
		for {
			select {
			case <-next.C:
				l.text(text(time.Since(began)))
				next.Reset(lineEvery)
			case <-end:
				return
			}
		}
	}()
	return func() {
		close(end)
		<-ended
	}
}

// measuring is a line about something that watches a guest for a time, and then does what
// takes no known time.
func measuring(interval time.Duration, then string) func(time.Duration) string {
	return func(passed time.Duration) string {
		if passed >= interval && then != "" {
			return then + ", " + passed.Round(time.Second).String()
		}
		return progressBar(float64(passed)/float64(interval), 20) + " measuring what the guest writes"
	}
}

// readingMemory is a line about memory that is read from a snapshot.
func readingMemory(what string, read func() uint64, all uint64) func(time.Duration) string {
	return func(passed time.Duration) string {
		n := min(read(), all)
		if n == 0 || all == 0 {
			return what + ", " + passed.Round(time.Second).String()
		}
		return counted(what, n, all)
	}
}

// counted is a line about bytes of which some are done.
func counted(what string, done, all uint64) string {
	done = min(done, all)
	return progressBar(float64(done)/float64(all), 20) + " " + what + ", " + units.Bytes(done) + " of " + units.Bytes(all)
}

// arriving is a line about a guest that arrives.
func arriving(in migrate.ReceiveProgress) string {
	text := units.Bytes(in.BytesReceived) + " from " + plain(in.Peer)
	if in.PassBytes == 0 {
		return text
	}
	return progressBar(float64(in.PassedBytes)/float64(in.PassBytes), 20) + " " + in.Pass + ", " + text
}

// waiting is a line about something that takes no known time.
func waiting(what string) func(time.Duration) string {
	return func(passed time.Duration) string { return what + ", " + passed.Round(time.Second).String() }
}
