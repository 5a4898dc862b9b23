package api

import (
	"net/http"
	"time"

	"github.com/govmm/govmm/internal/kind"
)

// BalloonRequest is the body of PUT /v1/balloon.
type BalloonRequest struct {
	Target *uint64 `json:"target"` // bytes that the balloon is to hold
}

// PowerButtonRequest is the body of POST /v1/power-button.
type PowerButtonRequest struct {
	// Wait is how long the answer waits for the guest to power off; 0: not at
	// all.
	Wait Duration `json:"wait,omitempty"`
}

// maxWait bounds PowerButtonRequest.Wait.
const maxWait = 24 * time.Hour

func (s *Server) getBalloon(w http.ResponseWriter, r *http.Request) error {
	b, err := s.vm.Balloon(r.Context())
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, b)
}

func (s *Server) putBalloon(w http.ResponseWriter, r *http.Request) error {
	var req BalloonRequest
	if err := body(w, r, &req); err != nil {
		return err
	}
	if req.Target == nil {
		return kind.Invalid(`body: expected a target in bytes, as in {"target":67108864}`)
	}
	if err := s.vm.SetBalloon(r.Context(), *req.Target); err != nil {
		return err
	}
	return s.getBalloon(w, r)
}

// postPowerButton answers when the VM has ended, the time is up or the client
// has left.
func (s *Server) postPowerButton(w http.ResponseWriter, r *http.Request) error {
	var req PowerButtonRequest
	if err := body(w, r, &req); err != nil {
		return err
	}
	if time.Duration(req.Wait) > maxWait {
		return kind.Invalid("wait %v: must be at most %v", time.Duration(req.Wait), maxWait)
	}
	if err := s.vm.PowerOff(r.Context()); err != nil {
		return err
	}
	if req.Wait != 0 {
		limit := time.NewTimer(time.Duration(req.Wait))
		defer limit.Stop()
		select {
		case <-s.vm.Ended():
		case <-limit.C:
		case <-r.Context().Done():
		}
	}
	return s.getInfo(w, r)
}
