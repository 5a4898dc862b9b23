package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/govmm/govmm/internal/boundedlog"
)

// newLog returns a logger that writes a line for each record of level Info and
// above: "govmm: message key=value ...". Nobody who logs waits for out, a terminal or pipe
// that nobody may read, and a guest cannot fill it: see [boundedlog.New].
func newLog(out io.Writer) *slog.Logger {
	return boundedlog.New(slog.New(&lineHandler{out: out}))
}

// flushLog waits a second at most for what was logged.
func flushLog(log *slog.Logger) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	boundedlog.Flush(ctx, log)
}

// lineHandler is the slog.Handler of newLog. A line is one write to out. It is called by one
// goroutine at a time.
type lineHandler struct {
	out   io.Writer
	attrs string // of WithAttrs, as they are written
	group string // of WithGroup: "a.b."
}

// Enabled implements [slog.Handler].
func (h *lineHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }

// Handle implements [slog.Handler].
func (h *lineHandler) Handle(_ context.Context, r slog.Record) error {
	var line strings.Builder
	line.WriteString("govmm: " + strings.ReplaceAll(r.Message, "\n", "; ") + h.attrs)
	r.Attrs(func(a slog.Attr) bool {
		writeAttr(&line, h.group, a)
		return true
	})
	line.WriteByte('\n')
	_, err := io.WriteString(h.out, line.String())
	return err
}

// WithAttrs implements [slog.Handler].
func (h *lineHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	var b strings.Builder
	for _, a := range attrs {
		writeAttr(&b, h.group, a)
	}
	with := *h
	with.attrs += b.String()
	return &with
}

// WithGroup implements [slog.Handler].
func (h *lineHandler) WithGroup(name string) slog.Handler {
	with := *h
	if name != "" {
		with.group += name + "."
	}
	return &with
}

// writeAttr writes " key=value", or the attributes of a group.
func writeAttr(b *strings.Builder, group string, a slog.Attr) {
	v := a.Value.Resolve()
	switch {
	case a.Equal(slog.Attr{}): // slog.Handler: to be ignored
	case v.Kind() == slog.KindGroup:
		if a.Key != "" {
			group += a.Key + "."
		}
		for _, a := range v.Group() {
			writeAttr(b, group, a)
		}
	default:
		_, _ = fmt.Fprintf(b, " %s%s=%s", group, a.Key, quoted(v.String()))
	}
}

// quoted is s, in quotes if it would not be one word: it may come from a guest or
// a peer, and must not end the line.
func quoted(s string) string {
	odd := func(r rune) bool { return r == '"' || unicode.IsSpace(r) || !unicode.IsPrint(r) }
	if s == "" || strings.ContainsFunc(s, odd) {
		return strconv.Quote(s)
	}
	return s
}
