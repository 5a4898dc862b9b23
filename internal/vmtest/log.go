package vmtest

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
)

// Within returns a context that ends when the test has waited long enough.
func Within(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testenv.Patience)
	t.Cleanup(cancel)
	return ctx
}

// Image makes the image of a disk, all zeros, and returns its path.
func Image(t testing.TB, name string, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	testenv.Check(t, os.WriteFile(path, nil, 0o600))
	testenv.Check(t, os.Truncate(path, size))
	return path
}

// Log returns a logger whose lines go to the test's log, until the test has ended.
func Log(t testing.TB) *slog.Logger {
	l := &lines{take: func(line string) { t.Helper(); t.Log(line) }}
	t.Cleanup(func() {
		l.lineMu.Lock()
		defer l.lineMu.Unlock()
		l.take = func(string) {}
	})
	return logger(l)
}

// LogTo returns a logger whose lines, without their time, go to a channel. A line
// waits until the channel takes it.
func LogTo(to chan<- string) *slog.Logger {
	return logger(&lines{take: func(line string) { to <- line }})
}

func logger(l *lines) *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))
}

// lines passes on each line that a slog.TextHandler writes.
type lines struct {
	lineMu sync.Mutex // guards take, and is held while it is called
	take   func(line string)
}

func (l *lines) Write(p []byte) (int, error) {
	l.lineMu.Lock()
	defer l.lineMu.Unlock()
	l.take(strings.TrimSpace(string(p)))
	return len(p), nil
}
