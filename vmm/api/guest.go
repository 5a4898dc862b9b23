package api

import (
	"context"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/kind"
)

// BalloonRequest is the body of PUT /v1/balloon.
type BalloonRequest struct {
	Target uint64 `json:"target" doc:"bytes of guest memory that the balloon is to hold"`
}

// PowerButtonRequest is the body of POST /v1/power-button.
type PowerButtonRequest struct {
	// Wait is how long the answer waits for the guest to power off; 0: not at
	// all.
	Wait Duration `json:"wait,omitempty" doc:"how long the answer waits for the guest to power off"`
}

// maxWait bounds PowerButtonRequest.Wait.
const maxWait = 24 * time.Hour

// registerGuest adds what a guest is asked for.
func (s *Server) registerGuest(a huma.API) {
	register(a, operation(http.MethodGet, "/v1/balloon", "get-balloon", "Describe the memory balloon, with statistics that the guest is asked for now"),
		func(ctx context.Context, _ *struct{}) (*answer[balloon.Info], error) { return s.balloon(ctx) })
	register(a, operation(http.MethodPut, "/v1/balloon", "set-balloon", "Set how much of the guest's memory the balloon is to hold"),
		func(ctx context.Context, in *struct{ Body BalloonRequest }) (*answer[balloon.Info], error) {
			if err := s.vm.SetBalloon(ctx, in.Body.Target); err != nil {
				return nil, err
			}
			return s.balloon(ctx)
		})
	register(a, operation(http.MethodPost, "/v1/power-button", "press-power-button", "Press the power button, and wait until the guest has powered off or the time has passed"),
		func(ctx context.Context, in *struct{ Body *PowerButtonRequest }) (*answer[Info], error) {
			var wait time.Duration
			if in.Body != nil {
				wait = time.Duration(in.Body.Wait)
			}
			return s.after(s.powerOff(ctx, wait))
		})
}

func (s *Server) balloon(ctx context.Context) (*answer[balloon.Info], error) {
	b, err := s.vm.Balloon(ctx)
	if err != nil {
		return nil, err
	}
	return &answer[balloon.Info]{b}, nil
}

// powerOff returns when the VM has ended, the time is up or the client has left.
func (s *Server) powerOff(ctx context.Context, wait time.Duration) error {
	if wait > maxWait {
		return kind.Invalid("wait %v: must be at most %v", wait, maxWait)
	}
	if err := s.vm.PowerOff(ctx); err != nil || wait == 0 {
		return err
	}
	limit := time.NewTimer(wait)
	defer limit.Stop()
	select {
	case <-s.vm.Ended():
	case <-limit.C:
	case <-ctx.Done():
	}
	return nil
}
