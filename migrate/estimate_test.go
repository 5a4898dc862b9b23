package migrate

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
	"pgregory.net/rapid"
)

// rateOf is the rate of a guest that writes perSecond pages a second, of a working set.
func rateOf(perSecond, workingSet, ram uint64) DirtyRate {
	r := DirtyRate{Interval: time.Second, RAMBytes: ram * mempage.Size}
	for _, ms := range []uint64{8, 16, 31, 63, 125, 250, 500, 1000} {
		r.Samples = append(r.Samples, DirtySample{After: time.Duration(ms) * time.Millisecond, Pages: min(workingSet, perSecond*ms/1000)})
	}
	r.Pages = r.Samples[7].Pages
	return r
}

func TestDirtiedFollowsTheSamples(t *testing.T) {
	r := rateOf(10000, 4000, 100000)
	for d, want := range map[time.Duration][2]uint64{
		0:                      {0, 0},
		4 * time.Millisecond:   {40, 40},
		200 * time.Millisecond: {1900, 2100},
		time.Second:            {4000, 4000},
		time.Minute:            {4000, 4000}, // the working set, over and over
	} {
		if got := dirtied(r, d); got < want[0] || got > want[1] {
			t.Errorf("%v: %d pages, want %v", d, got, want)
		}
	}
	if got := dirtied(rateOf(10000, 1<<40, 100000), time.Minute); got != 100000 {
		t.Errorf("more than there is: %d pages", got)
	}
	if got := dirtied(DirtyRate{}, time.Second); got != 0 {
		t.Errorf("nothing measured: %d pages", got)
	}
}

func TestPredict(t *testing.T) {
	link := linkSpeed{bandwidth: 100 << 20, rtt: time.Millisecond} // 25,600 pages a second
	opt := DefaultOptions()
	opt.DowntimeLimit = 50 * time.Millisecond

	idle := predict(prediction{link: link, rate: rateOf(0, 0, 25600), data: 25600}, opt)
	if !idle.Converges || idle.Rounds != 1 || idle.Total < time.Second || idle.Total > 1100*time.Millisecond || idle.Downtime > 20*time.Millisecond {
		t.Errorf("idle: %+v", idle)
	}
	// 4096 pages are 160 ms: a second round, in which it writes 1600, and a third.
	busy := predict(prediction{link: link, rate: rateOf(10000, 4096, 25600), data: 25600}, opt)
	if !busy.Converges || busy.Rounds != 3 || busy.Downtime > 50*time.Millisecond {
		t.Errorf("busy: %+v", busy)
	}
	never := predict(prediction{link: link, rate: rateOf(50000, 20000, 25600), data: 25600}, opt)
	if never.Converges || never.Note == "" || never.Downtime < 500*time.Millisecond || never.Rounds > 3 {
		t.Errorf("faster than the link: %+v", never)
	}
	opt.BandwidthLimit = 10 << 20
	slow := predict(prediction{link: link, rate: rateOf(0, 0, 25600), data: 25600}, opt)
	if !slow.Converges || slow.Total < 10*time.Second || slow.Total > 10100*time.Millisecond {
		t.Errorf("at a tenth: %+v", slow)
	}
	opt.BandwidthLimit, opt.MaxRounds = 0, 1
	if e := predict(prediction{link: link, rate: rateOf(10000, 4096, 25600), data: 25600}, opt); e.Converges || e.Rounds != 1 {
		t.Errorf("one round is not enough: %+v", e)
	}
}

// Whatever was measured, a prediction ends and is finite.
func TestPredictEnds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ram := rapid.Uint64Range(1, 1<<32).Draw(t, "ram")
		opt := DefaultOptions()
		opt.DowntimeLimit = time.Duration(rapid.Int64Range(int64(time.Millisecond), int64(time.Minute)).Draw(t, "limit"))
		e := predict(prediction{
			link: linkSpeed{bandwidth: rapid.Float64Range(0, 1e12).Draw(t, "bandwidth"), rtt: time.Duration(rapid.Int64Range(0, 1e9).Draw(t, "rtt"))},
			rate: rateOf(rapid.Uint64Range(0, 1<<32).Draw(t, "rate"), rapid.Uint64Range(0, ram).Draw(t, "set"), ram),
			data: rapid.Uint64Range(0, ram).Draw(t, "data"),
		}, opt)
		if e.Rounds < 1 || e.Total < 0 || e.Downtime < 0 || e.Converges == (e.Note != "") {
			t.Fatalf("%+v", e)
		}
	})
}

func probeReceiver(t *testing.T) (addr string, r *Receiver) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r = NewReceiver(nil, nil)
	served := make(chan error, 1)
	go func() { served <- r.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		<-served
	})
	return ln.Addr().String(), r
}

func probeOf(ctx context.Context, addr string, n int) (linkSpeed, error) {
	return probeLinks(ctx, newDialer(addr, Options{PeerTimeout: time.Minute}), n)
}

func TestProbe(t *testing.T) {
	addr, r := probeReceiver(t)
	s, err := probeOf(context.Background(), addr, 1)
	if err != nil || s.bandwidth <= 0 || s.rtt <= 0 {
		t.Fatalf("%+v, %v", s, err)
	}
	for probes := 1; probes > 0; time.Sleep(time.Millisecond) {
		r.sessionMu.Lock()
		probes = r.probes
		r.sessionMu.Unlock()
	}
	for _, c := range []struct {
		want   string
		taken  bool
		active *session
		probes int
	}{
		{want: "has arrived here already", taken: true},
		{want: "is under way", active: &session{}},
		{want: "4 others are probing", probes: maxProbes},
	} {
		r.sessionMu.Lock()
		r.taken, r.active, r.probes = c.taken, c.active, c.probes
		r.sessionMu.Unlock()
		if _, err := probeOf(context.Background(), addr, 1); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("want %q: %v", c.want, err)
		}
	}
	r.sessionMu.Lock()
	r.taken, r.active, r.probes = false, nil, 0
	r.sessionMu.Unlock()
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("enough"))
	if _, err := probeOf(ctx, addr, 1); err == nil {
		t.Error("a cancelled probe succeeds")
	}
}

// What a probe may send is bounded, and other frames are refused.
func TestProbeIsBounded(t *testing.T) {
	addr, r := probeReceiver(t)
	for name, h := range map[string]header{
		"a frame too long": {typ: frameProbe, length: maxProbeFrame + 1},
		"pages":            {typ: framePages, length: 16},
		"a state":          {typ: frameState},
		"commit":           {typ: frameCommit},
		"a long round":     {typ: frameRound, length: 1},
	} {
		c, err := newDialer(addr, Options{PeerTimeout: time.Minute}).connect(context.Background(),
			newHello(purposeProbe, sessionID{1}))
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		if f, err := c.readHeader(); err != nil || f.typ != frameHelloOK {
			t.Fatalf("%v, %v", f, err)
		} else if _, err := c.readPayload(f, maxControl); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, headerSize)
		h.encode(b)
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
		if f, err := c.readHeader(); err != nil || f.typ != frameRefused {
			t.Errorf("%s: %v, %v", name, f.typ, err)
		}
		c.Close()
	}
	for probes := 1; probes > 0; time.Sleep(time.Millisecond) {
		r.sessionMu.Lock()
		probes = r.probes
		r.sessionMu.Unlock()
	}
}
