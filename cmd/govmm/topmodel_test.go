package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/screen"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio/blk"
	vnet "github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
)

// readingOf makes an answer of a VM with one disk, one network device and a balloon.
func readingOf(name string, at time.Time, pid int, counts deviceCounts, cpu time.Duration) reading {
	var i api.Info
	i.Name, i.PID, i.State, i.CPUs, i.Memory = name, pid, vmm.StateRunning, 2, 1<<30
	i.Devices = vmm.Devices{
		{Info: &blk.Info{ReadBytes: counts.diskRead, WrittenBytes: counts.diskWritten}},
		{Info: &vnet.Info{RxBytes: counts.netRx, TxBytes: counts.netTx}},
		{Info: &balloon.Info{Actual: 64 << 20}},
	}
	return reading{name: name, at: at, info: i, use: processUse{ok: true, cpu: cpu, resident: 123 << 20}}
}

// Rates are what two answers differ in; where there is nothing to compare they are unknown.
func TestTopRates(t *testing.T) {
	f := newFleet("name")
	now := time.Now()
	check := func(what string, cpu, read, written, rx, tx rate) {
		t.Helper()
		r := f.rows["a"]
		if r.cpu != cpu || r.diskRead != read || r.diskWrit != written || r.netRx != rx || r.netTx != tx {
			t.Errorf("%s: %v %v %v %v %v", what, r.cpu, r.diskRead, r.diskWrit, r.netRx, r.netTx)
		}
	}
	known := func(v float64) rate { return rate{v, true} }
	none := rate{}
	f.apply(readingOf("a", now, 1, deviceCounts{1000, 2000, 3000, 4000}, time.Second))
	check("the first answer", none, none, none, none, none)
	f.apply(readingOf("a", now.Add(2*time.Second), 1, deviceCounts{1000, 2100, 3000, 6000}, 2*time.Second))
	check("the second one", known(0.5), known(0), known(50), known(0), known(1000))
	if r := f.rows["a"]; r.balloon != 64<<20 || r.use.resident != 123<<20 {
		t.Errorf("%+v", r)
	}
	// A machine that was made anew counts from 0.
	f.apply(readingOf("a", now.Add(3*time.Second), 1, deviceCounts{500, 2100, 3000, 6000}, 2*time.Second))
	check("after a reset", known(0), none, known(0), known(0), known(0))
	f.apply(readingOf("a", now.Add(4*time.Second), 2, deviceCounts{9000, 9000, 9000, 9000}, 9*time.Second))
	check("in another process", none, none, none, none, none)
	f.apply(readingOf("a", now.Add(4*time.Second), 2, deviceCounts{9000, 9000, 9000, 9000}, 9*time.Second))
	check("at the same time", none, none, none, none, none)
	// A VM that does not answer keeps what it has said; with the next answer its rates are
	// those of all the time between.
	f.apply(reading{name: "a", at: now.Add(6 * time.Second), err: api.ErrNoAnswer})
	check("no answer", none, none, none, none, none)
	if r := f.rows["a"]; r.state != stateSilent || r.info.Memory != 1<<30 {
		t.Errorf("%+v", r)
	}
	f.apply(readingOf("a", now.Add(14*time.Second), 2, deviceCounts{9000, 9000, 9000, 10000}, 9*time.Second))
	check("an answer again", known(0), known(0), known(0), known(0), known(100))
	f.apply(reading{name: "a", err: api.ErrNotRunning, gone: true})
	if len(f.rows) != 0 {
		t.Error("it is still there")
	}
}

func TestTopSorts(t *testing.T) {
	f := newFleet("name")
	for i, name := range []string{"vm10", "vm2", "b", "vm"} {
		f.rows[name] = &vmRow{name: name, state: vmm.StateRunning, cpu: rate{float64(i), i != 2}}
	}
	f.rows["b"].state = vmm.StatePaused
	for _, tc := range []struct {
		key     string
		reverse bool
		want    string
	}{
		{"name", false, "b vm vm2 vm10"},
		{"name", true, "vm10 vm2 vm b"},
		{"cpu", false, "vm vm2 vm10 b"},
		{"cpu", true, "vm10 vm2 vm b"}, // what is not known stays last
		{"state", false, "b vm vm2 vm10"},
		{"read", false, "b vm vm2 vm10"},
	} {
		f.sort, f.reverse = tc.key, tc.reverse
		var names []string
		for _, r := range f.sorted() {
			names = append(names, r.name)
		}
		if got := strings.Join(names, " "); got != tc.want {
			t.Errorf("%s, reverse %v: %s, want %s", tc.key, tc.reverse, got, tc.want)
		}
	}
	for _, k := range append(sortable(topColumns), sortable(psColumns)...) {
		if k != "name" && k != "state" && sortKeys[k] == nil {
			t.Errorf("nothing sorts by %s", k)
		}
	}
}

func TestShortBytes(t *testing.T) {
	for n, want := range map[float64]string{0: "0", 1: "1", 999: "999", 999.6: "1.0K", 1536: "1.5K", 10 << 10: "10K", 999 << 10: "999K",
		1000 << 10: "1.0M", 123 << 20: "123M", 2 << 30: "2.0G", 5 << 40: "5.0T", 1 << 60: "1024P"} {
		if got := shortBytes(n); got != want {
			t.Errorf("%v: %q, want %q", n, got, want)
		}
	}
}

// hostileFleet are VMs that say anything, n of them.
func hostileFleet(n int) *fleet {
	f := newFleet("name")
	now := time.Now()
	for i := range n {
		r := readingOf(fmt.Sprintf("a-vm-with-a-long-name-%d", i), now, 100+i, deviceCounts{}, 0)
		switch i % 5 {
		case 1:
			r.info.Migration = &migrate.Progress{Phase: migrate.PhasePrecopy, Address: "\x1b]0;x\a\x1b[2J\nhost\u202e:7000", Round: 3, RAMBytes: 1 << 30, RemainingBytes: 300 << 20, BandwidthBytes: 100 << 20}
			r.info.State = "migrating\x1b[31m"
		case 2:
			r.info.Incoming, r.info.State = &migrate.ReceiveProgress{Active: true, Peer: "\x9b2J" + strings.Repeat("x", 5000), BytesReceived: 1 << 20}, vmm.StateReceiving
		case 3:
			r.err = errors.New("\r\x1b[Hbad")
		case 4:
			r.info.Migration = &migrate.Progress{Phase: migrate.PhaseFailed, Error: "\x1b[2Jfailed", Address: "\a"}
		}
		f.apply(r)
	}
	return f
}

// At every width and height the screen is filled to its last line and no further, whatever
// the VMs say, and the VM that is selected is on it.
func TestTopLayout(t *testing.T) {
	for _, n := range []int{0, 1, 7, 300} {
		for width := 1; width <= 200; width += 1 + width/20*3 {
			for _, height := range []int{1, 2, 3, 4, 5, 6, 24} {
				v := &topView{title: "govmm top", columns: topColumns, fleet: hostileFleet(min(n, 12)), acts: true}
				if n > 12 && width < 4 {
					v.fleet = hostileFleet(n)
				}
				v.frame(width, height, time.Now())
				v.key(t.Context(), screen.End)
				lines := v.frame(width, height, time.Now())
				if len(lines) != height {
					t.Fatalf("%d VMs, %d x %d: %d lines", n, width, height, len(lines))
				}
				reverse := 0
				for _, l := range lines {
					if l.Style == screen.Reverse {
						reverse++
						if want := v.selected[:min(len(v.selected), width-1, 7)]; !strings.HasPrefix(l.Text, want) {
							t.Fatalf("%d x %d: %q, want %q", width, height, l.Text, want)
						}
						if len(l.Text) > width {
							t.Fatalf("%d x %d: a row of %d: %q", width, height, len(l.Text), l.Text)
						}
					}
					if strings.ContainsFunc(l.Text, func(r rune) bool { return r < ' ' || r > '~' }) {
						t.Fatalf("%d x %d: %q", width, height, l.Text)
					}
				}
				if want := min(n, 1); reverse != want {
					t.Fatalf("%d VMs, %d x %d: %d selected rows", n, width, height, reverse)
				}
			}
		}
	}
}

// The wider, the more columns; the most important ones stay.
func TestTopColumns(t *testing.T) {
	f := hostileFleet(5)
	was := 0
	for width := 20; width <= 200; width++ {
		t1 := fit(topColumns, f.sorted(), "name", width)
		if len(t1.columns) < was {
			t.Errorf("%d wide: %d columns, %d in a narrower one", width, len(t1.columns), was)
		}
		was = len(t1.columns)
		if t1.columns[0].key != "name" {
			t.Errorf("%d wide: begins with %s", width, t1.columns[0].key)
		}
		if h := t1.header(false); len(h) > width {
			t.Errorf("%d wide: %q", width, h)
		}
	}
	if was != len(topColumns) {
		t.Errorf("%d columns of %d at a width of 200", was, len(topColumns))
	}
	row := f.rows["a-vm-with-a-long-name-1"]
	for width := 12; width < 100; width++ {
		if cell := row.migrationCell(width); len(cell) > width || !strings.HasPrefix(cell, "[##") {
			t.Errorf("%d wide: %q", width, cell)
		}
	}
	if cell := row.migrationCell(0); !strings.Contains(cell, "70%") || !strings.Contains(cell, "round 3") {
		t.Errorf("%q", cell)
	}
}

// A VM that has gone is followed by the one in its place, and a table that is scrolled does
// not end above the last row.
func TestTopSelection(t *testing.T) {
	v := &topView{columns: topColumns, fleet: hostileFleet(40), acts: true}
	v.frame(80, 10, time.Now())
	if v.at != 0 {
		t.Errorf("row %d is selected before a key", v.at)
	}
	v.fleet.apply(readingOf("a", time.Now(), 1, deviceCounts{}, 0)) // it comes before all others
	if v.frame(80, 10, time.Now()); v.selected != "a" {
		t.Errorf("%s is selected before a key", v.selected)
	}
	delete(v.fleet.rows, "a")
	v.key(t.Context(), screen.End)
	v.frame(80, 10, time.Now())
	if v.at != 39 || v.offset+v.page != 40 {
		t.Errorf("row %d, from %d, %d shown", v.at, v.offset, v.page)
	}
	delete(v.fleet.rows, v.selected)
	v.frame(80, 10, time.Now())
	if v.at != 38 || v.selected != "a-vm-with-a-long-name-38" || v.offset+v.page != 39 {
		t.Errorf("row %d, %s, from %d", v.at, v.selected, v.offset)
	}
	v.move('g')
	v.move(screen.PageDown)
	v.frame(80, 10, time.Now())
	if v.at != v.page {
		t.Errorf("a page down: row %d", v.at)
	}
	v.fleet.rows = map[string]*vmRow{}
	v.frame(80, 10, time.Now())
	for _, k := range []screen.Key{screen.Down, screen.End, 'p', 'm', 'x', 'c', 'd', 'e'} {
		v.key(t.Context(), k) // there is no VM to do it to
	}
	if v.prompt != nil || v.message != "" {
		t.Error("something was done to no VM")
	}
}

// The process of this test has used processor time and memory.
func TestUseOf(t *testing.T) {
	for end := time.Now().Add(30 * time.Millisecond); time.Now().Before(end); {
	}
	u := useOf(os.Getpid())
	if !u.ok || u.cpu <= 0 || u.resident < 1<<20 {
		t.Errorf("%+v", u)
	}
	if u := useOf(1 << 30); u.ok || u.cpu != 0 {
		t.Errorf("of no process: %+v", u)
	}
}

// Text from elsewhere is one line of printable ASCII.
func FuzzPlain(f *testing.F) {
	f.Add("web")
	f.Add("\x1b[2J\xff\u202e\n\"")
	f.Fuzz(func(t *testing.T, s string) {
		p := plain(s)
		if strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r > '~' }) {
			t.Errorf("%q", p)
		}
		if len(s) < 100 && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' || r == '\\' }) && p != s {
			t.Errorf("%q became %q", s, p)
		}
	})
}
