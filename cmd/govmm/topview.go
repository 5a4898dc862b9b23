package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/govmm/govmm/internal/screen"
	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
)

// topView is a table of VMs on a whole terminal. One goroutine uses it, that of run.
type topView struct {
	title    string
	columns  []column
	fleet    *fleet
	interval time.Duration
	acts     bool   // keys do something to VMs
	tlsDir   string // for migrations; "": without TLS

	screen   *screen.Screen
	rows     []*vmRow // as they were shown last
	selected string   // name of a VM
	chosen   bool     // by the user; otherwise it is the first one
	at       int      // its row
	offset   int      // of the first row that is shown
	page     int      // how many rows are shown
	message  string   // what has happened last
	prompt   *prompt  // what the user is asked; nil: nothing
	text     []string // shown in place of the table; nil: nothing
	from     int      // its first line that is shown
	waits    bool     // VMs have been asked
	listErr  error    // why the list of VMs is not known
	results  chan func()
	leaves   bool
}

// drawEvery bounds how often answers make the screen be drawn.
const drawEvery = 30 * time.Millisecond

// run shows the table until the user leaves, the terminal goes away or ctx ends.
func (v *topView) run(ctx context.Context, s *screen.Screen, poll *poller) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	v.screen, v.results = s, make(chan func())
	tick := time.NewTicker(v.interval)
	defer tick.Stop()
	v.poll(ctx, poll)
	var draw <-chan time.Time
	for !v.leaves {
		select {
		case k, ok := <-s.Keys():
			if !ok {
				return nil // the terminal has gone
			}
			v.key(ctx, k)
			v.draw()
		case r := <-poll.answers:
			if poll.took(r) {
				v.fleet.apply(r)
			}
			if draw == nil {
				draw = time.After(drawEvery)
			}
		case <-draw:
			draw = nil
			v.draw()
		case done := <-v.results:
			done()
			v.draw()
		case <-s.Changed():
			v.draw()
		case <-tick.C:
			v.poll(ctx, poll)
			v.draw()
		case <-ctx.Done():
			return nil
		}
	}
	return nil
}

// poll asks all VMs.
func (v *topView) poll(ctx context.Context, p *poller) {
	gone, err := p.ask(ctx)
	v.listErr, v.waits = err, len(p.asked) > 0
	v.fleet.forget(gone)
}

// later makes what happened in another goroutine known to this one.
func (v *topView) later(ctx context.Context, done func()) {
	select {
	case v.results <- done:
	case <-ctx.Done():
	}
}

func (v *topView) say(format string, args ...any) { v.message = plain(fmt.Sprintf(format, args...)) }

// current is the VM that is selected, nil if there is none.
func (v *topView) current() *vmRow { return v.fleet.rows[v.selected] }

func (v *topView) draw() {
	width, height := v.screen.Size()
	v.screen.Draw(v.frame(width, height, time.Now()))
}

// frame makes the lines of a screen. Of a low one the lines around the table are left out
// first.
func (v *topView) frame(width, height int, now time.Time) []screen.Line {
	if v.text != nil {
		return v.textFrame(height)
	}
	v.arrange()
	var above, below []screen.Line
	if height >= 5 {
		above = append(above, screen.Line{Text: v.titleText(now), Style: screen.Bold})
	}
	t := fit(v.columns, v.rows, v.fleet.sort, width)
	if height >= 3 {
		above = append(above, screen.Line{Text: t.header(v.fleet.reverse), Style: screen.Faint})
	}
	if height >= 4 || height >= 2 && v.prompt != nil {
		below = append(below, screen.Line{Text: v.statusText(width, now)})
	}
	if height >= 6 {
		below = append(below, screen.Line{Text: v.helpText(width), Style: screen.Faint})
	}
	v.page = max(height-len(above)-len(below), 1)
	v.scroll()
	lines := above
	for i := v.offset; i < min(v.offset+v.page, len(v.rows)); i++ {
		line := screen.Line{Text: t.row(v.rows[i])}
		if i == v.at {
			line.Style = screen.Reverse
		}
		lines = append(lines, line)
	}
	if len(v.rows) == 0 {
		text := "no VM runs"
		if v.waits {
			text = "no VM has answered yet"
		}
		lines = append(lines, screen.Line{Text: text})
	}
	for len(lines) < height-len(below) {
		lines = append(lines, screen.Line{})
	}
	return append(lines, below...)
}

// arrange sorts the rows and finds the one that is selected. If its VM has gone that is the
// one that is in its place.
func (v *topView) arrange() {
	v.rows = v.fleet.sorted()
	at := slices.IndexFunc(v.rows, func(r *vmRow) bool { return r.name == v.selected })
	switch {
	case !v.chosen: // which VM answers first means nothing
		at = min(0, len(v.rows)-1)
	case at < 0:
		at = min(v.at, len(v.rows)-1)
	}
	if v.at = max(at, 0); len(v.rows) > 0 {
		v.selected = v.rows[v.at].name
	}
}

// scroll makes the selected row one that is shown.
func (v *topView) scroll() {
	v.offset = min(v.offset, max(len(v.rows)-v.page, 0))
	v.offset = max(min(v.offset, v.at), v.at-v.page+1)
}

// textFrame shows text in place of the table.
func (v *topView) textFrame(height int) []screen.Line {
	v.page = max(height-1, 1)
	v.from = max(min(v.from, len(v.text)-v.page), 0)
	var lines []screen.Line
	for _, l := range v.text[v.from:min(v.from+v.page, len(v.text))] {
		lines = append(lines, screen.Line{Text: l})
	}
	for len(lines) < height-1 {
		lines = append(lines, screen.Line{})
	}
	return append(lines, screen.Line{Text: "any other key than up and down goes back", Style: screen.Faint})
}

func (v *topView) titleText(now time.Time) string {
	states := map[vmm.State]int{}
	for _, r := range v.rows {
		states[r.state]++
	}
	s := v.title + "  " + now.Local().Format(time.TimeOnly) + "  " + countVMs(len(v.rows))
	for _, state := range []vmm.State{vmm.StateRunning, vmm.StatePaused, vmm.StateMigrating, vmm.StateReceiving, vmm.StatePanicked, vmm.StateHandoffUnknown, stateSilent} {
		if n := states[state]; n > 0 {
			s += fmt.Sprintf(", %d %s", n, state)
		}
	}
	if v.page > 0 && len(v.rows) > v.page {
		s += fmt.Sprintf("  (from %d)", v.offset+1)
	}
	return s
}

// statusText is what the user is asked, what has happened last, or more about the VM that is
// selected.
func (v *topView) statusText(width int, now time.Time) string {
	switch r := v.current(); {
	case v.prompt != nil:
		return v.prompt.line(width)
	case v.message != "":
		return v.message
	case v.listErr != nil:
		return plain(v.listErr.Error())
	case r != nil && v.acts:
		return r.details(now)
	}
	return ""
}

// details are what the table has no room for.
func (r *vmRow) details(now time.Time) string {
	var words []string
	add := func(format string, args ...any) { words = append(words, fmt.Sprintf(format, args...)) }
	if r.err != nil {
		return plain(r.name + ": " + r.err.Error())
	}
	add("pid %d", r.info.PID)
	if r.info.Kernel != "" {
		add("%s", r.info.Kernel)
	}
	if r.balloon > 0 {
		add("balloon %s", shortBytes(float64(r.balloon)))
	}
	if r.info.Panicked {
		add("its kernel has panicked")
	}
	if r.dirty.ok && r.migrating() == nil {
		add("dirty %s/s %s ago", shortBytes(r.dirty.perSecond), now.Sub(r.dirtyAt).Round(time.Second))
	}
	if p := r.info.Migration; p != nil && (p.Phase == migrate.PhaseFailed || p.Phase == migrate.PhaseCancelled) {
		add("migration to %s %s: %s", p.Address, p.Phase, p.Error)
	} else if p := r.migrating(); p != nil {
		add("%s sent, downtime ~%s", units.Bytes(p.BytesSent), formatMS(p.EstimatedDowntime))
	}
	return plain(r.name + ": " + strings.Join(words, ", "))
}

// helpText is the last line: the keys, as many as fit.
func (v *topView) helpText(width int) string {
	keys := []string{"q quit", "h help", "p pause", "m migrate", "c console", "d dirty rate", "<> sort", "r reverse", "x cancel", "e events"}
	if !v.acts {
		keys = []string{"q quit", "<> sort", "r reverse"}
	}
	s := keys[0]
	for _, k := range keys[1:] {
		if len(s)+2+len(k) > width {
			break
		}
		s += "  " + k
	}
	return s
}
