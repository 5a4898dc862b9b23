package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
)

func TestProgressBar(t *testing.T) {
	for _, tc := range []struct {
		fraction float64
		want     string
	}{{0, "[----------]  0%"}, {0.456, "[####------] 45%"}, {0.999, "[#########-] 99%"}, {1, "[##########] 100%"}, {7, "[##########] 100%"}, {-1, "[----------]  0%"}} {
		if got := progressBar(tc.fraction, 10); got != tc.want {
			t.Errorf("%v: %q, want %q", tc.fraction, got, tc.want)
		}
	}
	for _, tc := range []struct {
		p    migrate.Progress
		want float64
	}{
		{migrate.Progress{Phase: migrate.PhaseSetup, RAMBytes: 100}, 0},
		{migrate.Progress{Phase: migrate.PhasePrecopy}, 0},
		{migrate.Progress{Phase: migrate.PhasePrecopy, RAMBytes: 100, RemainingBytes: 25}, 0.75},
		{migrate.Progress{Phase: migrate.PhasePrecopy, RAMBytes: 100, RemainingBytes: 200}, 0},
		{migrate.Progress{Phase: migrate.PhaseDisks, RAMBytes: 100, RemainingBytes: 100, DiskBytes: 100, DiskRemainingBytes: 50}, 0.5},
		{migrate.Progress{Phase: migrate.PhasePostcopy, RAMBytes: 100, RemainingBytes: 10}, 0.9},
		{migrate.Progress{Phase: migrate.PhaseSwitchover, RAMBytes: 100, RemainingBytes: 10}, 1},
	} {
		if got := fractionOf(&tc.p); got != tc.want {
			t.Errorf("%+v: %v", tc.p, got)
		}
	}
}

// A line has a bar where there is room for one, and what a peer has said cannot control the
// terminal.
func TestProgressLineText(t *testing.T) {
	p := migrate.Progress{Phase: migrate.PhasePrecopy, Round: 1, RAMBytes: 1 << 30, BytesSent: 1 << 29, RemainingBytes: 1 << 29}
	const text = "round 1, 512 MiB sent, 512 MiB left"
	for width, want := range map[int]string{
		79: "[##########----------] 50% " + text,
		50: "[###----] 50% " + text,
		46: text,
		20: text,
	} {
		if got := progressLineText(p, width); got != want {
			t.Errorf("%d wide: %q, want %q", width, got, want)
		}
	}
	p = migrate.Progress{Phase: migrate.PhaseConnecting, Elapsed: 3100 * time.Millisecond}
	if got := progressLineText(p, 79); got != "connecting, 3s" {
		t.Errorf("%q", got)
	}
	p = migrate.Progress{Phase: migrate.PhasePostcopy, Error: "\x1b[2Jgone\r"}
	if got := progressLineText(p, 200); strings.ContainsAny(got, "\x1b\r") || !strings.Contains(got, "gone") {
		t.Errorf("%q", got)
	}
}

func TestLinesOfWhatTakesLong(t *testing.T) {
	read := uint64(0)
	m := readingMemory("restoring", func() uint64 { return read }, 4<<30)
	for _, tc := range []struct{ got, want string }{
		{measuring(2*time.Second, "then this")(time.Second), "[##########----------] 50% measuring what the guest writes"},
		{measuring(2*time.Second, "then this")(5 * time.Second), "then this, 5s"},
		{measuring(time.Second, "")(3 * time.Second), "[####################] 100% measuring what the guest writes"},
		{m(2 * time.Second), "restoring, 2s"},
		{func() string { read = 1 << 30; return m(time.Second) }(), "[#####---------------] 25% restoring, 1.00 GiB of 4.00 GiB"},
		{arriving(migrate.ReceiveProgress{Peer: "h:1\x1b", BytesReceived: 64}), "64 B from h:1\\x1b"},
		{arriving(migrate.ReceiveProgress{Peer: "h:1", BytesReceived: 1 << 20, Pass: "disks", PassedBytes: 3 << 30, PassBytes: 4 << 30}), "[###############-----] 75% disks, 1.00 MiB from h:1"},
		{waiting("waiting")(1400 * time.Millisecond), "waiting, 1s"},
	} {
		if tc.got != tc.want {
			t.Errorf("%q, want %q", tc.got, tc.want)
		}
	}
}

// What else a snapshot takes is drawn in place of its migration.
func TestProgressLineInstead(t *testing.T) {
	var out bytes.Buffer
	instead := "copying disks"
	l := &progressLine{out: &out, width: func() int { return 80 }, instead: func() string { return instead }}
	l.draw(migrate.Progress{Phase: migrate.PhaseSaving})
	instead = ""
	l.draw(migrate.Progress{Phase: migrate.PhaseSaving})
	if got := out.String(); got != "\r\x1b[Kcopying disks\r\x1b[Ksaving" {
		t.Errorf("%q", got)
	}
}

// What is quick draws nothing; what takes longer draws until it has ended, and erases it.
func TestDuring(t *testing.T) {
	var out bytes.Buffer
	l := &progressLine{out: &out, width: func() int { return 80 }}
	l.during(waiting("quick"))()
	if out.Len() != 0 {
		t.Errorf("%q", out.String())
	}
	drawn := make(chan struct{}, 100)
	stop := l.during(func(time.Duration) string { drawn <- struct{}{}; return "slow" })
	<-drawn
	<-drawn
	stop()
	if s := out.String(); strings.Count(s, "slow") < 2 || !strings.HasSuffix(s, "slow\r\x1b[K") {
		t.Errorf("%q", s)
	}
	(&progressLine{}).during(func(time.Duration) string { t.Error("drawn on no terminal"); return "" })()
}

// Whatever takes longer than a second has a line on a terminal, and none on a pipe.
func TestLongCommandsHaveALine(t *testing.T) {
	for _, tc := range []struct {
		args string
		says string
		exit int
	}{
		{"dirty-rate --interval 1s", "measuring what the guest writes", exitDone},
		{"migrate --estimate --to h:1 --interval 1s", "measuring what the guest writes", exitDone},
		{"migrate --check --to h:1", "asking h:1", exitBefore},
		{"stop", "waiting until the guest has powered off", exitDone},
	} {
		t.Run(tc.args, func(t *testing.T) {
			t.Parallel()
			c := newCLI(t)
			serve := func() {
				c.serve("", &fakeVM{slow: 1200 * time.Millisecond, obeys: vmm.StateStopped})
			}
			serve()
			tm := c.open(strings.Fields(tc.args)...)
			tm.await(tc.says)
			tm.ended(tc.exit)
			for deadline := vmtest.Within(t); ; time.Sleep(time.Millisecond) { // all that was printed is read
				tm.mu.Lock()
				s := tm.screen.String()
				tm.mu.Unlock()
				if i := strings.LastIndex(s, tc.says); strings.Contains(s[i:], "\r\x1b[K") {
					break
				}
				if deadline.Err() != nil {
					t.Fatalf("the line is not erased: %q", s)
				}
			}
			if strings.HasPrefix(tc.args, "stop") {
				serve()
			}
			if exit, stdout, stderr := c.run(strings.Fields(tc.args)...); exit != tc.exit || strings.Contains(stdout+stderr, tc.says) || strings.Contains(stdout+stderr, "\x1b") {
				t.Errorf("on a pipe: exit %d, %q, %q", exit, stdout, stderr)
			}
		})
	}
}
