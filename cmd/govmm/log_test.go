package main

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"
	"testing/slogtest"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/internal/vmtest"
	"golang.org/x/sys/unix"
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
		tc.log()
		if flushLog(log); out.String() != tc.want {
			t.Errorf("%q, want %q", out.String(), tc.want)
		}
	}
}

// The contract of slog.Handler, except for time and level, which are not written.
func TestLogHandler(t *testing.T) {
	var out *bytes.Buffer
	var log *slog.Logger
	slogtest.Run(t, func(*testing.T) slog.Handler {
		out = new(bytes.Buffer)
		log = newLog(out)
		return log.Handler()
	}, func(t *testing.T) map[string]any {
		flushLog(log)
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

// TestStderrThatNobodyReads: a VM whose stderr is a full pipe starts, resets, is paused and
// ends.
func TestStderrThatNobodyReads(t *testing.T) {
	testenv.NeedKVM(t)
	c := newCLI(t)
	r, w, err := os.Pipe()
	testenv.Check(t, err)
	defer r.Close()
	size, err := unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, 4096)
	testenv.Check(t, err)
	_, err = w.Write(make([]byte, size))
	testenv.Check(t, err)
	cmd := c.command(t.Context(), "run", "--memory", "32M", "--serial", "null")
	cmd.Stderr = w
	testenv.Check(t, cmd.Start())
	testenv.Check(t, w.Close())
	deadline := vmtest.Within(t)
	for {
		if exit, out, _ := c.run("info"); exit == exitDone && strings.Contains(out, "running") {
			break
		}
		testenv.Check(t, deadline.Err())
	}
	for _, command := range [][]string{{"pause"}, {"resume"}, {"stop", "--force"}} {
		if exit, _, stderr := c.run(command...); exit != exitDone {
			t.Fatalf("%s: exit status %d: %s", command, exit, stderr)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}
