package api

import (
	"net/http"
	"runtime"
	"strings"
	"time"
)

// maxStanding bounds how long a reading waits for the guest to go on.
const maxStanding = time.Second

// polite keeps readings, which may be many, from the processors that a migration needs: at
// most as many as there are processors are answered at once, and none while the guest stands
// still. What changes something, streams and consoles are not held up.
func (s *Server) polite(next http.HandlerFunc) http.Handler {
	slots := make(chan struct{}, runtime.GOMAXPROCS(0))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || !isReading(r.URL.Path) {
			next(w, r)
			return
		}
		select {
		case slots <- struct{}{}:
		case <-r.Context().Done():
			return
		}
		defer func() { <-slots }()
		if still := s.vm.Standing(); still != nil {
			limit := time.NewTimer(maxStanding)
			defer limit.Stop()
			select {
			case <-still:
			case <-limit.C:
			case <-r.Context().Done():
				return
			}
		}
		next(w, r)
	})
}

// isReading is for the routes that are polled, and answered at once.
func isReading(path string) bool {
	switch path {
	case "/v1/info", "/v1/migration", "/v1/migrations", "/v1/config", metricsPath:
		return true
	}
	return strings.HasPrefix(path, "/v1/migrations/") || strings.HasPrefix(path, "/v1/openapi")
}
