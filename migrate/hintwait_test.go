package migrate_test

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/simtest"
)

// scriptedLink carries so many bytes a second, on all data connections together. Control
// takes no time.
type scriptedLink struct {
	*simtest.Listener
	rate float64

	mu    sync.Mutex // guards what follows
	conns int
	free  time.Time
}

func (l *scriptedLink) dial(ctx context.Context, address string) (net.Conn, error) {
	c, err := l.Dial(ctx, address)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conns++; l.conns == 1 || err != nil {
		return c, err
	}
	return &scriptedConn{c, l}, nil
}

type scriptedConn struct {
	net.Conn
	link *scriptedLink
}

func (c *scriptedConn) Write(p []byte) (int, error) {
	c.link.mu.Lock()
	if now := time.Now(); c.link.free.Before(now) {
		c.link.free = now
	}
	c.link.free = c.link.free.Add(time.Duration(float64(len(p)) / c.link.rate * float64(time.Second)))
	wait := time.Until(c.link.free)
	c.link.mu.Unlock()
	time.Sleep(wait)
	return c.Conn.Write(p)
}

// scriptedPages is the size of the guest that is moved over a scripted link. The first
// eighth of it is in use.
const scriptedPages = 16 << 10

// overScriptedLink moves a guest in simulated time, which only links, guests and waits
// take. The first pages of it have content, as many as fill; prepare, if set, changes it.
func overScriptedLink(t *testing.T, mode migrate.HintMode, rate float64, driver simtest.Driver, fill uint64, prepare func(*simtest.Machine)) (r migrate.Result) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		driver.Skip = scriptedPages / 8
		w := simtest.NewWorld()
		m, err := simtest.NewMachine(w, simtest.Config{
			Layout: simtest.Layout{Slots: []migrate.Slot{{Pages: scriptedPages}}, ManualProtect: true, InitiallySet: true},
			CPUs:   1, Seed: 3, Dirty: 64, Rate: 1000, Fill: fill, Balloon: true,
		})
		if err != nil {
			t.Fatal(err)
		}
		m.Balloon.Driver = driver
		if prepare != nil {
			prepare(m)
		}
		if err := m.Resume(); err != nil {
			t.Fatal(err)
		}
		link := &scriptedLink{Listener: simtest.Listen(), rate: rate}
		receiver := migrate.NewReceiver(&passDriver{Builder: simtest.Builder{World: w}, from: m}, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(context.Background())
		served := make(chan error, 1)
		go func() { served <- receiver.Serve(ctx, link) }()
		opt := migrate.DefaultOptions()
		opt.Hints, opt.Dial, opt.Channels = mode, link.dial, 2
		migration := migrate.New(m, "there", opt)
		if _, err := migration.Run(context.Background()); err != nil {
			t.Error(err)
		} else {
			<-receiver.Arrived()
		}
		if err := w.Err(); err != nil {
			t.Error(err)
		}
		r = migration.Result()
		cancel()
		<-served
		w.Close()
	})
	return r
}

// The engine over links and guests of scripted speeds: mode auto takes at most 1.05 of the
// better of on and off, and spares most of what on spares where the guest is faster than
// the link. [TestHintPace] has many more, of the decision alone.
func TestHintsNeverCostTime(t *testing.T) {
	const mb = 1e6
	ms := time.Millisecond
	pace := func(rate float64) time.Duration {
		return time.Duration(64 * mempage.Size / rate * float64(time.Second))
	}
	for _, c := range []struct {
		name   string
		link   float64
		driver simtest.Driver
		spares bool
	}{
		{"a fast guest, a slow link", 20 * mb, simtest.Driver{Pace: pace(200 * mb)}, true},
		{"a guest that is little faster", 100 * mb, simtest.Driver{Pace: pace(150 * mb)}, true},
		{"a slow guest, a fast link", 500 * mb, simtest.Driver{Pace: pace(50 * mb)}, false},
		{"a late guest", 20 * mb, simtest.Driver{Pace: pace(500 * mb), Late: 50 * ms}, true},
		{"a guest that begins at the last moment", 20 * mb, simtest.Driver{Pace: pace(500 * mb), Late: 900 * ms}, false},
		{"a guest that says nothing", 100 * mb, simtest.Driver{Silent: true}, false},
		{"a guest that does not end", 20 * mb, simtest.Driver{Pace: pace(500 * mb), Endless: true}, true},
		{"a guest that answers in bursts", 20 * mb, simtest.Driver{Rest: func(n uint64) time.Duration {
			if n%1024 == 0 {
				return 25 * ms
			}
			return 0
		}}, true},
		{"a guest that stops halfway", 20 * mb, simtest.Driver{Pace: pace(500 * mb), Rest: func(n uint64) time.Duration {
			if n == scriptedPages/2 {
				return time.Hour
			}
			return 0
		}}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			on := overScriptedLink(t, migrate.HintsOn, c.link, c.driver, scriptedPages, nil)
			off := overScriptedLink(t, migrate.HintsOff, c.link, c.driver, scriptedPages, nil)
			auto := overScriptedLink(t, migrate.HintsAuto, c.link, c.driver, scriptedPages, nil)
			t.Logf("off %v, %d pages sent; on %v, %d sent, %d hinted; auto %v (waited %v), %d sent, %d hinted", off.Total.Round(ms), off.PagesSent,
				on.Total.Round(ms), on.PagesSent, on.PagesHinted, auto.Total.Round(ms), auto.HintWait.Round(ms), auto.PagesSent, auto.PagesHinted)
			if best := min(on.Total, off.Total); auto.Total > best*105/100+5*ms {
				t.Errorf("auto takes %v, the better of on and off %v", auto.Total, best)
			}
			if c.spares && auto.PagesHinted*10 < on.PagesHinted*9 {
				t.Errorf("auto spares %d pages, on %d", auto.PagesHinted, on.PagesHinted)
			}
			if on.PagesHinted == 0 != c.driver.Silent {
				t.Errorf("on spares %d pages", on.PagesHinted)
			}
		})
	}
}

// A page that was zero costs nothing on the wire, so nobody waits for its hint.
func TestAutoDoesNotWaitForZeros(t *testing.T) {
	driver := simtest.Driver{Pace: time.Millisecond} // 262 MB a second
	got := overScriptedLink(t, migrate.HintsAuto, 20e6, driver, scriptedPages/8, func(m *simtest.Machine) {
		for page := uint64(scriptedPages / 8); page < scriptedPages; page++ {
			m.GuestZero(0, page)
		}
	})
	if got.HintsReceived < scriptedPages*3/4 || got.HintWait > 20*time.Millisecond { // until the first block is known
		t.Errorf("%+v", got)
	}
}

// A guest with init_on_alloc writes zeros to what it hints. For pages that were in use,
// zeros are cheaper than their content; pages that never were only become populated, and
// auto stops asking.
func TestAGuestThatZeroesWhatItHints(t *testing.T) {
	for _, c := range []struct {
		name string
		mode migrate.HintMode
		fill uint64
		stop bool
	}{
		{"hardly used", migrate.HintsAuto, scriptedPages / 8, true},
		{"used", migrate.HintsAuto, scriptedPages, false},
		{"hardly used, but asked for", migrate.HintsOn, scriptedPages / 8, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := overScriptedLink(t, c.mode, 20e6, simtest.Driver{Zeroes: true, Pace: time.Millisecond}, c.fill, nil)
			if stopped := strings.Contains(got.HintsOff, "init_on_alloc"); stopped != c.stop {
				t.Errorf("stopped: %v, %+v", stopped, got)
			}
			if c.stop && got.HintsReceived > scriptedPages*7/8 {
				t.Errorf("it was stopped after %d pages", got.HintsReceived)
			}
			if got.PagesSent > scriptedPages/4 {
				t.Errorf("%d pages were sent: %+v", got.PagesSent, got)
			}
		})
	}
}
