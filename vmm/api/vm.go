package api

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"
	"github.com/govmm/govmm/internal/kind"
)

// ResumeRequest is the body of POST /v1/resume.
type ResumeRequest struct {
	Force bool `json:"force,omitempty" doc:"resume a guest that may run elsewhere: if it does, it then runs twice"`
}

// registerVM adds what every VM can do.
func (s *Server) registerVM(a huma.API) {
	register(a, operation(http.MethodGet, "/v1/info", "get-info", "Describe the VM"),
		func(context.Context, *struct{}) (*answer[Info], error) { return s.info() })
	register(a, operation(http.MethodPost, "/v1/pause", "pause", "Stop the vCPUs; answers when none runs"),
		func(ctx context.Context, _ *nothing) (*answer[Info], error) { return s.after(s.vm.Pause(ctx)) })
	register(a, operation(http.MethodPost, "/v1/resume", "resume", "Let the vCPUs run"),
		func(ctx context.Context, in *struct{ Body *ResumeRequest }) (*answer[Info], error) {
			return s.after(s.vm.Resume(ctx, in.Body != nil && in.Body.Force))
		})
	register(a, operation(http.MethodPost, "/v1/stop", "stop", "End the VM at once; answers when everything is freed"),
		func(ctx context.Context, _ *nothing) (*answer[Info], error) { return s.after(s.vm.Stop(ctx)) })
	register(a, operation(http.MethodGet, "/v1/config", "get-config", "The configuration from which such a VM is started (govmm run --config)"),
		func(context.Context, *struct{}) (*answer[map[string]any], error) {
			if s.Config == nil {
				return nil, kind.Errorf(ErrNotFound, "this VM was not started from a command line")
			}
			return &answer[map[string]any]{s.Config()}, nil
		})
}

func (s *Server) info() (*answer[Info], error) {
	return &answer[Info]{Info{s.vm.Info(), s.socket}}, nil
}

// after answers with the VM's Info if nothing went wrong.
func (s *Server) after(err error) (*answer[Info], error) {
	if err != nil {
		return nil, err
	}
	return s.info()
}
