package api

import (
	"net/http"
	"runtime"
	"strings"
	"time"

	"golang.org/x/time/rate"
)

const (
	// maxStanding bounds how long a reading waits for the guest to go on.
	maxStanding = time.Second
	// movingRate is how many readings a second are answered while the guest is migrated, so that
	// many clients leave the processors to it, and are not in the midst of something when it
	// stops: that costs each step of the stop a turn in the scheduler's queue.
	movingRate  = 100
	movingBurst = 4
)

// polite keeps readings, which may be many, from the processors that a migration needs: at
// most as many as there are processors are answered at once, some a second while the guest is
// migrated, and none while it stands still. What changes something, streams and consoles are
// not held up.
func (s *Server) polite(next http.HandlerFunc) http.Handler {
	slots, pace := make(chan struct{}, runtime.GOMAXPROCS(0)), rate.NewLimiter(movingRate, movingBurst)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || !isReading(r) {
			next(w, r)
			return
		}
		select {
		case slots <- struct{}{}:
		case <-r.Context().Done():
			return
		}
		defer func() { <-slots }()
		if m := s.vm.Migration(); m != nil && !isClosed(m.Done()) && !waited(r, pace.Reserve().Delay(), m.Done()) {
			return
		}
		if still := s.vm.Standing(); still != nil && !waited(r, maxStanding, still) {
			return
		}
		next(w, r)
	})
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// waited waits for a time, or for until to be closed; it is false if the client has left.
func waited(r *http.Request, d time.Duration, until <-chan struct{}) bool {
	limit := time.NewTimer(d)
	defer limit.Stop()
	select {
	case <-until:
	case <-limit.C:
	case <-r.Context().Done():
		return false
	}
	return true
}

// isReading is for what is polled, and answered at once.
func isReading(r *http.Request) bool {
	switch path := r.URL.Path; path {
	case "/v1/info", "/v1/migration", "/v1/migrations", "/v1/config", metricsPath:
		return true
	case "/v1/events":
		return strings.Contains(r.URL.RawQuery, "follow=false")
	default:
		return strings.HasPrefix(path, "/v1/migrations/") || strings.HasPrefix(path, "/v1/openapi")
	}
}
