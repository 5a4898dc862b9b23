package main

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio/blk"
	vnet "github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
)

// stateSilent is shown for a VM that does not answer.
const stateSilent vmm.State = "no answer"

// rate is how much a second; ok: it is known, for which it takes two readings.
type rate struct {
	perSecond float64
	ok        bool
}

// vmRow is a VM as govmm top shows it.
type vmRow struct {
	name     string
	client   *api.Client
	state    vmm.State
	info     api.Info // of the last answer
	err      error    // why there was none since
	use      processUse
	balloon  uint64
	counts   deviceCounts
	at       time.Time // of the last answer; zero: there was none
	cpu      rate      // processors
	diskRead rate      // bytes, as those that follow
	diskWrit rate
	netRx    rate
	netTx    rate

	dirty    rate // what was measured last
	dirtyAt  time.Time
	measures bool   // it is being measured
	acts     string // what is being done to it; "": nothing
}

// deviceCounts are the counters of all devices of a VM.
type deviceCounts struct{ diskRead, diskWritten, netRx, netTx uint64 }

func countsOf(info api.Info) (c deviceCounts, inBalloon uint64) {
	for _, d := range info.Devices {
		switch i := d.Info.(type) {
		case *blk.Info:
			c.diskRead += i.ReadBytes
			c.diskWritten += i.WrittenBytes
		case *vnet.Info:
			c.netRx += i.RxBytes
			c.netTx += i.TxBytes
		case *balloon.Info:
			inBalloon = i.Actual
		}
	}
	return c, inBalloon
}

// fleet are the VMs that are shown. One goroutine uses it.
type fleet struct {
	rows    map[string]*vmRow
	sort    string // the key of a column
	reverse bool
}

func newFleet(sort string) *fleet { return &fleet{rows: map[string]*vmRow{}, sort: sort} }

// apply takes an answer.
func (f *fleet) apply(r reading) {
	if r.gone {
		delete(f.rows, r.name)
		return
	}
	row := f.rows[r.name]
	if row == nil {
		row = &vmRow{name: r.name}
		f.rows[r.name] = row
	}
	row.client = r.client
	if row.err = r.err; r.err != nil {
		row.state = stateSilent
		row.cpu, row.diskRead, row.diskWrit, row.netRx, row.netTx = rate{}, rate{}, rate{}, rate{}, rate{}
		return
	}
	counts, inBalloon := countsOf(r.info)
	// Another process, after an upgrade, counts from 0.
	same := !row.at.IsZero() && row.info.PID == r.info.PID
	d := r.at.Sub(row.at).Seconds()
	since := func(was, is uint64) rate {
		if !same || d <= 0 || is < was {
			return rate{}
		}
		return rate{float64(is-was) / d, true}
	}
	row.cpu = rate{}
	if row.use.ok && r.use.ok {
		row.cpu = since(uint64(row.use.cpu), uint64(r.use.cpu))
		row.cpu.perSecond /= float64(time.Second)
	}
	row.diskRead, row.diskWrit = since(row.counts.diskRead, counts.diskRead), since(row.counts.diskWritten, counts.diskWritten)
	row.netRx, row.netTx = since(row.counts.netRx, counts.netRx), since(row.counts.netTx, counts.netTx)
	row.state, row.info, row.use, row.at, row.counts, row.balloon = r.info.State, r.info, r.use, r.at, counts, inBalloon
}

// forget drops VMs that are there no longer.
func (f *fleet) forget(names []string) {
	for _, n := range names {
		delete(f.rows, n)
	}
}

// migrating is the migration from the VM that is under way, nil if there is none.
func (r *vmRow) migrating() *migrate.Progress {
	p := r.info.Migration
	if p == nil {
		return nil
	}
	switch p.Phase {
	case migrate.PhaseCompleted, migrate.PhaseFailed, migrate.PhaseCancelled:
		return nil
	}
	return p
}

// dirtyRate is how fast the guest writes: as its migration measures it, or as it was measured.
func (r *vmRow) dirtyRate() rate {
	if p := r.migrating(); p != nil && p.BandwidthBytes > 0 {
		return rate{float64(p.DirtyRateBytes), true}
	}
	return r.dirty
}

// sorted are the rows in the order of the sort column: names from a to z, quantities from
// the greatest. What is not known comes last, and names decide between equals.
func (f *fleet) sorted() []*vmRow {
	rows := make([]*vmRow, 0, len(f.rows))
	for _, r := range f.rows {
		rows = append(rows, r)
	}
	key := sortKeys[f.sort]
	slices.SortFunc(rows, func(a, b *vmRow) int {
		c := 0
		if key != nil {
			x, y := key(a), key(b)
			if x.ok && y.ok {
				c = cmp.Compare(y.perSecond, x.perSecond)
			} else if x.ok != y.ok {
				return map[bool]int{true: -1, false: 1}[x.ok]
			}
		} else if f.sort == "state" {
			c = strings.Compare(string(a.state), string(b.state))
		}
		if key == nil && f.sort != "state" {
			c = compareNames(a.name, b.name)
		}
		if f.reverse {
			c = -c
		}
		if c == 0 {
			c = compareNames(a.name, b.name)
		}
		return c
	})
	return rows
}

// sortKeys are the quantities by which VMs are sorted.
var sortKeys = map[string]func(*vmRow) rate{
	"cpus":     func(r *vmRow) rate { return rate{float64(r.info.CPUs), r.info.CPUs > 0} },
	"cpu":      func(r *vmRow) rate { return r.cpu },
	"memory":   func(r *vmRow) rate { return rate{float64(r.info.Memory), r.info.Memory > 0} },
	"resident": func(r *vmRow) rate { return rate{float64(r.use.resident), r.use.ok} },
	"read":     func(r *vmRow) rate { return r.diskRead },
	"written":  func(r *vmRow) rate { return r.diskWrit },
	"received": func(r *vmRow) rate { return r.netRx },
	"sent":     func(r *vmRow) rate { return r.netTx },
	"dirty":    (*vmRow).dirtyRate,
	"pid":      func(r *vmRow) rate { return rate{-float64(r.info.PID), r.info.PID > 0} },
}

// compareNames puts vm2 before vm10.
func compareNames(a, b string) int {
	stem := func(s string) (string, int) {
		digits := len(s) - len(strings.TrimRight(s, "0123456789"))
		n, err := strconv.Atoi(s[len(s)-min(digits, 9):])
		if err != nil {
			return s, 0
		}
		return s[:len(s)-min(digits, 9)], n
	}
	sa, na := stem(a)
	sb, nb := stem(b)
	return cmp.Or(strings.Compare(sa, sb), cmp.Compare(na, nb), strings.Compare(a, b))
}

// plain makes text that came from elsewhere printable ASCII in one line, with everything else
// escaped as in Go.
func plain(s string) string {
	const most = 500
	if len(s) > most {
		s = s[:most] + "..."
	}
	q := strconv.QuoteToASCII(s)
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}
