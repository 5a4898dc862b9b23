package vmm

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
)

// lineHandler turns each record into one line of logf.
type lineHandler struct {
	logf  func(format string, args ...any)
	attrs []slog.Attr
}

// Enabled implements [slog.Handler], as do the next three.
func (lineHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h lineHandler) Handle(_ context.Context, r slog.Record) error {
	line := r.Message
	add := func(a slog.Attr) bool {
		line += fmt.Sprintf(", %s %v", a.Key, a.Value)
		return true
	}
	for _, a := range h.attrs {
		add(a)
	}
	r.Attrs(add)
	h.logf("%s", line)
	return nil
}

func (h lineHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	h.attrs = append(slices.Clone(h.attrs), attrs...)
	return h
}

func (h lineHandler) WithGroup(string) slog.Handler { return h }
