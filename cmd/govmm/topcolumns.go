package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
)

// column is a column of a table of VMs.
type column struct {
	key, title string
	left       bool // what is in it begins at the left
	rank       int  // the greater, the sooner it is left out of a narrow table
	cell       func(*vmRow) string
}

// wide is the last column: it takes what is left of a line.
const wide = "migration"

// topColumns are those of govmm top.
var topColumns = []column{
	{"name", "NAME", true, 0, func(r *vmRow) string { return plain(r.name) }},
	{"state", "STATE", true, 1, (*vmRow).stateText},
	{"cpus", "CPUS", false, 12, func(r *vmRow) string { return cpusText(r.info.CPUs) }},
	{"cpu", "CPU%", false, 2, func(r *vmRow) string { return percentText(r.cpu) }},
	{"memory", "MEMORY", false, 4, func(r *vmRow) string { return quantity(r.info.Memory) }},
	{"resident", "RES", false, 10, func(r *vmRow) string { return quantity(r.use.resident) }},
	{"read", "READ/s", false, 6, func(r *vmRow) string { return rateText(r.diskRead) }},
	{"written", "WRIT/s", false, 7, func(r *vmRow) string { return rateText(r.diskWrit) }},
	{"received", "RECV/s", false, 8, func(r *vmRow) string { return rateText(r.netRx) }},
	{"sent", "SENT/s", false, 9, func(r *vmRow) string { return rateText(r.netTx) }},
	{"dirty", "DIRTY/s", false, 5, (*vmRow).dirtyText},
	{wide, "MIGRATION", true, 3, nil},
}

// psColumns are those of govmm ps --watch.
var psColumns = []column{
	topColumns[0], topColumns[1], topColumns[2], topColumns[4],
	{"pid", "PID", false, 5, func(r *vmRow) string { return cpusText(r.info.PID) }},
	topColumns[len(topColumns)-1],
}

// sortable are the keys by which VMs can be sorted, in the order of the columns.
func sortable(columns []column) (keys []string) {
	for _, c := range columns {
		if c.key != wide {
			keys = append(keys, c.key)
		}
	}
	return keys
}

func (r *vmRow) stateText() string {
	if r.acts != "" {
		return r.acts
	}
	return plain(string(r.state))
}

func (r *vmRow) dirtyText() string {
	if r.measures {
		return "..."
	}
	return rateText(r.dirtyRate())
}

// percentText writes processors as top(1) does: 100% is one of them.
func percentText(r rate) string {
	p := r.perSecond * 100
	switch {
	case !r.ok:
		return "-"
	case p < 9.95:
		return fmt.Sprintf("%.1f", p)
	}
	return fmt.Sprintf("%.0f", p)
}

func rateText(r rate) string {
	if !r.ok {
		return "-"
	}
	return shortBytes(r.perSecond)
}

// quantity writes bytes; 0 is what is not known.
func quantity(n uint64) string {
	if n == 0 {
		return "-"
	}
	return shortBytes(float64(n))
}

// shortBytes writes bytes with at most five characters: 0, 999, 1.5K, 12M.
func shortBytes(n float64) string {
	unit := 0
	for n >= 999.5 && unit < 5 {
		n /= 1024
		unit++
	}
	if unit > 0 && n < 9.95 {
		return fmt.Sprintf("%.1f%c", n, " KMGTP"[unit])
	}
	return strings.TrimSpace(fmt.Sprintf("%.0f%c", n, " KMGTP"[unit]))
}

// migrationCell says what moves from or to a VM, in width characters at most; 0: as many as
// it takes. A short width leaves out words, not the figure.
func (r *vmRow) migrationCell(width int) string {
	var s string
	p, in := r.migrating(), r.info.Incoming
	switch {
	case errors.Is(r.err, api.ErrNoAnswer): // as the state says
	case r.err != nil:
		s = plain(r.err.Error())
	case p != nil:
		text, size := moveText(p), 10
		if width > 0 {
			size = min(max(width-len(text)-len("[] 100% "), 4), 20)
		}
		s = progressBar(fractionOf(p), size) + " " + text
	case in != nil && in.Active:
		s = "from " + plain(in.Peer) + ", " + units.Bytes(in.BytesReceived)
	case r.info.MissingPages > 0:
		s = units.Bytes(r.info.MissingPages*mempage.Size) + " of memory to come"
	case r.info.Address != "" && r.state == vmm.StateReceiving:
		s = "listening on " + plain(r.info.Address)
	}
	if width > 0 && len(s) > width {
		return s[:width]
	}
	return s
}

// moveText says in a few words how far a migration is.
func moveText(p *migrate.Progress) string {
	words := []string{string(p.Phase)}
	switch p.Phase {
	case migrate.PhasePrecopy:
		words[0] = "round " + strconv.Itoa(p.Round)
		words = append(words, units.Bytes(p.RemainingBytes)+" left")
	case migrate.PhaseDisks:
		words = append(words, units.Bytes(p.DiskRemainingBytes)+" left")
	case migrate.PhasePostcopy:
		if p.Postcopy != nil {
			words = append(words, units.Bytes(p.RemainingBytes)+" left")
		}
	}
	if p.BandwidthBytes > 0 {
		words = append(words, units.Bytes(p.BandwidthBytes)+"/s")
	}
	return plain(strings.Join(append(words, "to "+p.Address), ", "))
}

// table is a table of VMs that fits a width.
type table struct {
	columns []column
	widths  []int // of the columns
	between int   // blanks between two of them
	mark    string
}

// fit chooses the columns that fit width, the most important ones first, and how wide they
// are. width 0: all of them.
func fit(columns []column, rows []*vmRow, sortKey string, width int) table {
	natural := make([]int, len(columns))
	for i, c := range columns {
		longest := 0
		for _, r := range rows {
			if c.key == wide {
				longest = max(longest, len(r.migrationCell(0)))
			} else {
				longest = max(longest, len(c.cell(r)))
			}
		}
		if natural[i] = max(longest, len(c.title)); c.key == sortKey {
			natural[i] = max(natural[i], len(c.title)+1) // for the mark
		}
		if c.key == wide && longest == 0 {
			natural[i] = 0
		}
	}
	order := make([]int, len(columns))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return columns[a].rank - columns[b].rank })
	t := table{between: 2, mark: sortKey}
	if width > 0 && width < 60 {
		t.between = 1
	}
	const leastWide, leastName = 12, 8
	chosen, left := map[int]int{}, width
	for _, i := range order {
		need := natural[i]
		gap := t.between
		if len(chosen) == 0 {
			gap = 0
		}
		switch {
		case need == 0:
			continue
		case width == 0:
			chosen[i] = need
			continue
		case columns[i].key == wide:
			need = min(need, max(leastWide, len(columns[i].title)))
		case columns[i].key == "name": // it can be cut
			need = min(need, max(leastName, width/3), width)
		}
		if need+gap > left {
			break
		}
		chosen[i] = need
		left -= need + gap
	}
	for _, key := range []string{"name", wide} { // what is left goes to those that want more
		for i, w := range chosen {
			if columns[i].key == key && width > 0 {
				more := min(left, natural[i]-w)
				chosen[i] += more
				left -= more
			}
		}
	}
	for i, c := range columns {
		if w, ok := chosen[i]; ok {
			t.columns, t.widths = append(t.columns, c), append(t.widths, w)
		}
	}
	return t
}

// header is the line above the rows; the column by which they are sorted has a mark.
func (t *table) header(reverse bool) string {
	return t.line(func(c column, _ int) string {
		if c.key != t.mark {
			return c.title
		}
		if reverse {
			return c.title + "^"
		}
		return c.title + "v"
	})
}

func (t *table) row(r *vmRow) string {
	return t.line(func(c column, width int) string {
		if c.key == wide {
			return r.migrationCell(width)
		}
		return c.cell(r)
	})
}

func (t *table) line(cell func(column, int) string) string {
	var b strings.Builder
	for i, c := range t.columns {
		if i > 0 {
			b.WriteString(strings.Repeat(" ", t.between))
		}
		s, w := cell(c, t.widths[i]), t.widths[i]
		if len(s) > w && w > 0 {
			s = s[:w-1] + "~"
		}
		pad := strings.Repeat(" ", max(w-len(s), 0))
		if c.left {
			b.WriteString(s + pad)
		} else {
			b.WriteString(pad + s)
		}
	}
	return strings.TrimRight(b.String(), " ")
}
