package boundedlog

import "log/slog"

// Watch returns a logger that does as log, which [New] has returned, and calls f with the
// device and each record before it is bounded, on the goroutine that logs: f must return
// at once.
func Watch(log *slog.Logger, f func(device string, r slog.Record)) *slog.Logger {
	h, ok := log.Handler().(*handler)
	if !ok {
		return log
	}
	with := *h
	with.watch = f
	return slog.New(&with)
}
