package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/govmm/govmm/internal/charqueue"
)

// newLog returns a logger that writes a line for each record of level Info and
// above: "govmm: message key=value ...".
func newLog(out io.Writer) *slog.Logger {
	return slog.New(&lineHandler{writeMu: new(sync.Mutex), out: out})
}

// patientWriter passes on what is written to it, without waiting for it: a terminal or
// pipe that nobody reads must not stop who logs. Each Write is one line or more; what
// there is no room for is dropped, and counted.
type patientWriter struct {
	out *charqueue.Output

	writeMu sync.Mutex // guards dropped; makes a Write one piece of out
	dropped int
}

func newPatientWriter(out io.Writer) *patientWriter {
	return &patientWriter{out: charqueue.NewOutput(out, 1, func() {})}
}

func (w *patientWriter) Write(p []byte) (int, error) {
	w.writeMu.Lock()
	defer w.writeMu.Unlock()
	told := ""
	if w.dropped > 0 {
		told = fmt.Sprintf("govmm: %d lines were lost here, since nobody read them\n", w.dropped)
	}
	if w.out.Room() < len(told)+len(p) {
		w.dropped++
		return len(p), nil
	}
	w.dropped = 0
	w.out.Put([]byte(told))
	w.out.Put(p)
	return len(p), nil
}

// close waits a second at most for what was written.
func (w *patientWriter) close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if w.out.Drain(ctx) == nil {
		_ = w.out.Close() // of what could not be written nobody can be told
	}
}

// lineHandler is the slog.Handler of newLog.
type lineHandler struct {
	writeMu *sync.Mutex // makes a line one write to out; shared with what WithAttrs returns
	out     io.Writer
	attrs   string // of WithAttrs, as they are written
	group   string // of WithGroup: "a.b."
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
	h.writeMu.Lock()
	defer h.writeMu.Unlock()
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
