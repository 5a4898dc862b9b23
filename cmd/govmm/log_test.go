package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/slogtest"
	"time"
)

func TestLogLines(t *testing.T) {
	var out bytes.Buffer
	log := newLog(&out)
	for _, tc := range []struct {
		log  func()
		want string
	}{
		{func() { log.Info("the guest runs") }, "govmm: the guest runs\n"},
		{func() { log.Debug("nobody reads this") }, ""},
		{func() { log.Warn("input has ended", "device", "console", "err", errors.New("read x: no such file")) },
			`govmm: input has ended device=console err="read x: no such file"` + "\n"},
		{func() {
			log.Info("a", "s", `say "x"`, "n", 5, "d", 20*time.Millisecond, "empty", "", "path", "/srv/a=b")
		},
			`govmm: a s="say \"x\"" n=5 d=20ms empty="" path=/srv/a=b` + "\n"},
		{func() { log.Error("a\nb", "err", "c\nd\x1b[2J") }, `govmm: a; b err="c\nd\x1b[2J"` + "\n"},
		{func() { log.With("device", "disk a").With("q", 1).Warn("slow", "ms", 3) }, `govmm: slow device="disk a" q=1 ms=3` + "\n"},
		{func() { log.With("a", 1).WithGroup("g").With("b", 2).Warn("m", "c", 3, slog.Group("h", "d", 4)) }, "govmm: m a=1 g.b=2 g.c=3 g.h.d=4\n"},
	} {
		out.Reset()
		if tc.log(); out.String() != tc.want {
			t.Errorf("%q, want %q", out.String(), tc.want)
		}
	}
}

// The contract of slog.Handler, except for time and level, which are not written.
func TestLogHandler(t *testing.T) {
	var out *bytes.Buffer
	slogtest.Run(t, func(*testing.T) slog.Handler {
		out = new(bytes.Buffer)
		return newLog(out).Handler()
	}, func(t *testing.T) map[string]any {
		message, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimSpace(out.String()), "govmm: "), " ")
		fields := map[string]any{slog.LevelKey: slog.LevelInfo, slog.MessageKey: message}
		if !strings.Contains(t.Name(), "zero-time") {
			fields[slog.TimeKey] = time.Now()
		}
		for _, word := range strings.Fields(out.String()) {
			key, value, ok := strings.Cut(word, "=")
			if !ok {
				continue
			}
			in := fields
			path := strings.Split(key, ".")
			for _, g := range path[:len(path)-1] {
				if in[g] == nil {
					in[g] = map[string]any{}
				}
				in = in[g].(map[string]any)
			}
			in[path[len(path)-1]] = value
		}
		return fields
	})
}

// A line of one goroutine does not break that of another.
func TestLogFromManyGoroutines(t *testing.T) {
	var out bytes.Buffer
	log := newLog(&out)
	var all sync.WaitGroup
	for range 8 {
		log := log.With("k", "v")
		all.Go(func() {
			for range 100 {
				log.Info("message", "n", 1)
			}
		})
	}
	all.Wait()
	if want := strings.Repeat("govmm: message k=v n=1\n", 800); out.String() != want {
		t.Errorf("%d bytes, want %d", out.Len(), len(want))
	}
}

// gate is a terminal that nobody reads until it is opened.
type gate struct {
	open chan struct{}
	got  bytes.Buffer
}

func (g *gate) Write(p []byte) (int, error) {
	<-g.open
	return g.got.Write(p)
}

// Who logs does not wait for a terminal that nobody reads. What does not fit is counted.
func TestLogDoesNotWait(t *testing.T) {
	g := &gate{open: make(chan struct{})}
	w := newPatientWriter(g)
	log := newLog(w)
	for i := range 3000 {
		log.Info("some line of some length", "n", i)
	}
	close(g.open)
	if err := w.out.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	log.Info("the last one")
	w.close()
	lines := strings.Split(g.got.String(), "\n")
	kept := len(lines) - 3 // the count, the last line, and what is behind it
	if kept < 100 || kept > 2999 || lines[kept-1] != fmt.Sprintf("govmm: some line of some length n=%d", kept-1) ||
		lines[kept] != fmt.Sprintf("govmm: %d lines were lost here, since nobody read them", 3000-kept) || lines[kept+1] != "govmm: the last one" {
		t.Errorf("%d lines were kept; the last are %q", kept, lines[max(0, kept-1):])
	}
}
