package vmm

import (
	"context"
	"fmt"
	"log/slog"
)

// lineHandler turns each record into one line of logf.
type lineHandler struct {
	logf func(format string, args ...any)
}

// Enabled implements [slog.Handler], as do the next three.
func (lineHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h lineHandler) Handle(_ context.Context, r slog.Record) error {
	line := r.Message
	r.Attrs(func(a slog.Attr) bool {
		line += fmt.Sprintf(", %s %v", a.Key, a.Value)
		return true
	})
	h.logf("%s", line)
	return nil
}

func (h lineHandler) WithAttrs([]slog.Attr) slog.Handler { return h }

func (h lineHandler) WithGroup(string) slog.Handler { return h }
