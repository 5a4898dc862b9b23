package boundedlog

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/slogtest"
	"testing/synctest"
	"time"
)

// recorder is a handler that blocks while it is held.
type recorder struct {
	read   chan struct{} // nil, or closed: the log is read
	textMu sync.Mutex    // guards text
	text   bytes.Buffer
}

func (r *recorder) Write(p []byte) (int, error) {
	if r.read != nil {
		<-r.read
	}
	r.textMu.Lock()
	defer r.textMu.Unlock()
	return r.text.Write(p)
}

// taken returns the lines since the last call.
func (r *recorder) taken() []string {
	r.textMu.Lock()
	defer r.textMu.Unlock()
	defer r.text.Reset()
	return strings.FieldsFunc(r.text.String(), func(c rune) bool { return c == '\n' })
}

func (r *recorder) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(r, &slog.HandlerOptions{ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
			return slog.Attr{}
		}
		return a
	}}))
}

func expect(t *testing.T, r *recorder, want ...string) {
	t.Helper()
	synctest.Wait()
	got := r.taken()
	if len(got) != len(want) {
		t.Fatalf("%d lines, want %d: %q", len(got), len(want), got)
	}
	for i, line := range got {
		if line != "msg="+want[i] {
			t.Errorf("line %q, want %q", line, want[i])
		}
	}
}

// TestOneLineOfAKind: the first record of a kind is passed on at once, of the others one in
// ten seconds, with their number. Attributes make no kind, except the device.
func TestOneLineOfAKind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r recorder
		log := New(r.logger())
		disk, other := log.With("device", "disk"), log.With("q", 1)
		for i := range 20000 {
			disk.Warn("reset", "status", i)
			other.Warn("reset", "device", "net", "status", i)
		}
		expect(t, &r, "reset device=disk status=0", "reset q=1 device=net status=0")
		time.Sleep(every)
		synctest.Wait()
		if got := r.taken(); len(got) != 2 || !strings.Contains(strings.Join(got, "\n"), "msg=reset device=disk status=19999 more=19999") {
			t.Errorf("%q", got)
		}
		time.Sleep(every - 1)
		disk.Warn("reset", "status", 7)
		expect(t, &r)
		time.Sleep(time.Nanosecond)
		expect(t, &r, "reset device=disk status=7 more=1")
		time.Sleep(2 * every) // forgotten
		disk.Warn("reset", "status", 8)
		expect(t, &r, "reset device=disk status=8")
		disk.Warn("reset", "status", 9)
		Tell(log)
		expect(t, &r, "reset device=disk status=9 more=1")
		disk.Warn("reset", "status", 10)
		expect(t, &r, "reset device=disk status=10")
	})
}

// TestKindsAreBounded: of however many kinds a bounded number is kept, and nothing is
// forgotten without a count.
func TestKindsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r recorder
		log := New(r.logger())
		for i := range 1000 {
			log.Warn(fmt.Sprintf("kind%d", i))
			synctest.Wait()
		}
		if got := r.taken(); len(got) != maxKinds+1 || got[maxKinds] != fmt.Sprintf("msg=kind%d", maxKinds) {
			t.Errorf("%d lines", len(got))
		}
		Tell(log)
		expect(t, &r, fmt.Sprintf("kind999 more=%d", 1000-maxKinds-1))
	})
}

// TestNobodyWaits: a handler that blocks holds up nobody; what there is no room for is
// counted.
func TestNobodyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := recorder{read: make(chan struct{})}
		log := New(r.logger())
		log.Info("first")
		synctest.Wait() // it is with the handler
		for i := range maxKinds {
			for range every / time.Second {
				log.Info("line", "device", i)
			}
		}
		for range 10 { // maxWaiting is reached after some of these
			time.Sleep(every)
			for i := range maxKinds {
				log.Info("line", "device", i)
			}
		}
		time.Sleep(every)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		Flush(ctx, log) // comes back
		if ctx.Err() == nil {
			t.Error("flushed into a handler that blocks")
		}
		close(r.read)
		synctest.Wait()
		if n := len(r.taken()); n != maxWaiting+1 {
			t.Errorf("%d lines were kept", n)
		}
		log.Info("at last")
		synctest.Wait()
		if got := r.taken(); len(got) != 2 || !strings.HasPrefix(got[0], `msg="records of the log were lost here, since nobody took them" lost=`) || got[1] != `msg="at last"` {
			t.Errorf("%q", got)
		}
		Flush(t.Context(), log)
	})
}

// TestNew: a logger is bounded once, and one that is derived shares the bounds.
func TestNew(t *testing.T) {
	log := New(slog.New(slog.DiscardHandler))
	if New(log) != log {
		t.Error("it is bounded twice")
	}
	if with := log.With("a", 1).WithGroup("g"); New(with) != with {
		t.Error("a derived one is bounded twice")
	}
	if log.Enabled(t.Context(), slog.LevelError) {
		t.Error("what nobody reads is handled")
	}
}

// TestHandler: the contract of slog.Handler.
func TestHandler(t *testing.T) {
	var out *bytes.Buffer
	var log *slog.Logger
	slogtest.Run(t, func(*testing.T) slog.Handler {
		out = new(bytes.Buffer)
		log = New(slog.New(slog.NewTextHandler(out, nil)))
		return log.Handler()
	}, func(t *testing.T) map[string]any {
		Flush(t.Context(), log)
		return parse(out.String())
	})
}

// parse reads a line of slog.TextHandler.
func parse(line string) map[string]any {
	fields := map[string]any{}
	for _, word := range strings.Fields(line) {
		key, value, ok := strings.Cut(word, "=")
		if !ok {
			continue
		}
		in, path := fields, strings.Split(key, ".")
		for _, g := range path[:len(path)-1] {
			if in[g] == nil {
				in[g] = map[string]any{}
			}
			in = in[g].(map[string]any)
		}
		in[path[len(path)-1]] = value
	}
	return fields
}
