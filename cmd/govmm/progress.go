package main

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"

	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/migrate"
	"golang.org/x/term"
)

// progressLine is one line on a terminal that is drawn again and again.
type progressLine struct {
	width func() int
	// instead is drawn in place of a migration's progress, unless it is ""; nil: nothing is.
	instead func() string

	mu    sync.Mutex // guards all below; held while the line is written
	out   io.Writer  // nil: nothing is drawn
	drawn bool
}

// newProgressLine draws on out if it is a terminal and mode is auto.
func newProgressLine(out io.Writer, mode string) *progressLine {
	f, ok := out.(*os.File)
	if !ok || mode != "auto" || !term.IsTerminal(int(f.Fd())) {
		return &progressLine{}
	}
	return &progressLine{out: out, width: func() int {
		w, _, err := term.GetSize(int(f.Fd()))
		if err != nil || w <= 0 {
			return 80
		}
		return w
	}}
}

func (l *progressLine) draw(p migrate.Progress) {
	if l.out == nil {
		return
	}
	if l.instead != nil {
		if s := l.instead(); s != "" {
			l.text(s)
			return
		}
	}
	l.text(progressLineText(p, l.width()-1))
}

// text draws a line in ASCII; "": none.
func (l *progressLine) text(text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if text == "" {
		l.erase()
	}
	if l.out == nil || text == "" {
		return
	}
	if w := l.width() - 1; len(text) > w { // a line that wraps could not be drawn over
		text = text[:max(w, 0)]
	}
	_, _ = fmt.Fprint(l.out, "\r\x1b[K"+text)
	l.drawn = true
}

// clear erases the line, before something else is printed.
func (l *progressLine) clear() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.erase()
}

// erase is clear; mu is held.
func (l *progressLine) erase() {
	if l.drawn {
		_, _ = fmt.Fprint(l.out, "\r\x1b[K")
		l.drawn = false
	}
}

// progressText is in ASCII, so that it can be cut anywhere.
func progressText(p migrate.Progress) string {
	if p.Phase == migrate.PhaseDisks {
		return fmt.Sprintf("disks, %s sent, %s left of %s, %s/s", units.Bytes(p.DiskBytesSent), units.Bytes(p.DiskRemainingBytes), units.Bytes(p.DiskBytes), units.Bytes(p.BandwidthBytes))
	}
	if p.Phase == migrate.PhasePostcopy {
		return postcopyLine(p)
	}
	if p.Phase != migrate.PhasePrecopy {
		s := string(p.Phase)
		if p.BytesSent > 0 {
			s += ", " + units.Bytes(p.BytesSent) + " sent"
		}
		return s
	}
	parts := []string{
		fmt.Sprintf("round %d", p.Round),
		units.Bytes(p.BytesSent) + " sent",
		units.Bytes(p.RemainingBytes) + " left",
	}
	switch {
	case p.BandwidthBytes > 0:
		parts = append(parts, units.Bytes(p.BandwidthBytes)+"/s",
			"dirtied "+units.Bytes(p.DirtyRateBytes)+"/s",
			"downtime ~"+formatMS(p.EstimatedDowntime))
	case p.Elapsed > 0: // the first round: nothing has been measured yet
		parts = append(parts, units.Bytes(uint64(float64(p.BytesSent)/p.Elapsed.Seconds()))+"/s")
	}
	if p.ThrottlePercent > 0 {
		parts = append(parts, fmt.Sprintf("slowed by %d%%", p.ThrottlePercent))
	}
	return strings.Join(parts, ", ")
}

// printResult prints what a migration took.
func printResult(out io.Writer, r migrate.Result) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	row := func(cells ...string) { _, _ = fmt.Fprintln(w, strings.Join(cells, "\t")+"\t") }
	count := func(n uint64) string { return strconv.FormatUint(n, 10) }
	row("ROUND", "TIME", "TO SEND", "PAGES", "ZERO", "HOLES", "HINTED", "SENT")
	for _, x := range r.Rounds {
		row(strconv.Itoa(x.N), formatMS(x.Duration), count(x.DirtyPages), count(x.PagesSent), count(x.PagesZero),
			count(x.PagesHole), count(x.PagesHinted), units.Bytes(x.BytesSent))
	}
	row("all", formatMS(r.Total), "", count(r.PagesSent), count(r.PagesZero),
		count(r.PagesHole), count(r.PagesHinted), units.Bytes(r.BytesSent))
	if err := w.Flush(); err != nil {
		return err
	}
	if line := hintText(r); line != "" {
		if _, err := fmt.Fprintln(out, line); err != nil {
			return err
		}
	}
	text := fmt.Sprintf("%s: total %s, set-up %s, downtime %s, %s of memory", r.Status,
		formatMS(r.Total), formatMS(r.Setup), formatMS(r.Downtime), units.Bytes(r.RAMBytes))
	if r.DiskBytes > 0 {
		text += fmt.Sprintf(", %s of disks (%s sent)", units.Bytes(r.DiskBytes), units.Bytes(r.DiskBytesSent))
	}
	if r.Compression != "" && r.Compression != string(migrate.CompressNone) {
		text += fmt.Sprintf(", %s made pages %.2f times shorter", r.Compression, r.CompressionRatio)
	}
	_, err := fmt.Fprintln(out, text)
	if err != nil || r.Downtime == 0 {
		return err
	}
	_, err = fmt.Fprintf(out, "downtime: %s\n", downtimeText(r))
	if r.Postcopy != nil && err == nil {
		_, err = fmt.Fprintln(out, postcopyText(r.Postcopy))
	}
	return err
}

// downtimeText lists the parts of the downtime, and what lengthened it.
func downtimeText(r migrate.Result) string {
	d := r.DowntimeParts
	parts := fmt.Sprintf("pause %s, last sync %s, pages %s, state %s, disks %s, load %s, resume %s, wire %s", formatMS(d.Pause),
		formatMS(d.LastSync), formatMS(d.Pages), formatMS(d.State), formatMS(d.Storage+d.Yield), formatMS(d.Load), formatMS(d.Resume), formatMS(d.Wire))
	if r.StopsUndone > 0 {
		parts += fmt.Sprintf("; %d earlier stops undone, the last since %s", r.StopsUndone, r.UndoneNote)
	}
	if r.ThrottlePercent > 0 {
		parts += fmt.Sprintf("; the guest was slowed by up to %d%%", r.ThrottlePercent)
	}
	if r.DowntimeNote != "" {
		parts += "; " + r.DowntimeNote
	}
	return parts
}

// hintText is the line about free-page hints; "" if the VM has no balloon.
func hintText(r migrate.Result) string {
	if r.HintsReceived == 0 {
		if r.HintsOff == "" || r.HintsOff == migrate.ErrNoHintSource.Error() {
			return "" // most machines have none
		}
		return "hints: none, " + r.HintsOff
	}
	s := fmt.Sprintf("hints: %d pages received, %d late, %d rewritten, waited %s", r.HintsReceived, r.HintsLate, r.HintsRewritten,
		formatMS(r.HintWait))
	if r.HintsOff != "" {
		s += "; then " + r.HintsOff
	}
	return s
}
