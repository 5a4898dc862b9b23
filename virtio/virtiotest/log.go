package virtiotest

import (
	"log/slog"
	"strings"
	"testing"
)

// Log returns a logger whose records the test prints and gets as text, as long
// as lines takes them. lines may be nil.
func Log(t testing.TB, lines chan<- string) *slog.Logger {
	return slog.New(slog.NewTextHandler(logWriter{t, lines}, nil))
}

type logWriter struct {
	t     testing.TB
	lines chan<- string
}

// Write implements io.Writer.
func (w logWriter) Write(p []byte) (int, error) {
	line := strings.TrimSpace(string(p))
	w.t.Log(line)
	select {
	case w.lines <- line:
	default:
	}
	return len(p), nil
}
