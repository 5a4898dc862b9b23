package api

import (
	"context"
	"net/http"
	"time"

	"github.com/govmm/govmm/migrate"
)

// DirtyRateRequest is the body of POST /v1/dirty-rate.
type DirtyRateRequest struct {
	Interval Duration `json:"interval,omitempty"` // 0: migrate.DefaultRateInterval
}

// EstimateRequest is the body of POST /v1/migration/estimate: the options of a
// migration, and for how long to watch what the guest writes.
type EstimateRequest struct {
	MigrateRequest
	Interval Duration `json:"interval,omitempty"` // 0: migrate.DefaultRateInterval
}

// interval fills in the default.
func (d Duration) interval() time.Duration {
	if d == 0 {
		return migrate.DefaultRateInterval
	}
	return time.Duration(d)
}

func (s *Server) postDirtyRate(w http.ResponseWriter, r *http.Request) error {
	var req DirtyRateRequest
	if err := body(w, r, &req); err != nil {
		return err
	}
	rate, err := s.vm.MeasureDirtyRate(r.Context(), req.Interval.interval())
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, rate)
}

func (s *Server) postEstimate(w http.ResponseWriter, r *http.Request) error {
	var req EstimateRequest
	if err := body(w, r, &req); err != nil {
		return err
	}
	opt, err := req.Options()
	if err != nil {
		return err
	}
	e, err := s.vm.EstimateMigration(r.Context(), req.To, opt, req.Interval.interval())
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, e)
}

// DirtyRate measures how fast the guest writes its memory. The end of ctx ends
// the measurement.
func (c *Client) DirtyRate(ctx context.Context, req DirtyRateRequest) (migrate.DirtyRate, error) {
	var rate migrate.DirtyRate
	err := c.callWithin(ctx, c.Timeout+req.Interval.interval(), http.MethodPost, "/v1/dirty-rate", req, &rate)
	return rate, err
}

// estimateTime bounds what an estimate takes in addition to its interval: to
// measure the link, and to look at all memory.
const estimateTime = time.Minute

// Estimate predicts what a migration would take. The end of ctx ends it.
func (c *Client) Estimate(ctx context.Context, req EstimateRequest) (migrate.Estimate, error) {
	var e migrate.Estimate
	err := c.callWithin(ctx, c.Timeout+req.Interval.interval()+estimateTime, http.MethodPost, "/v1/migration/estimate", req, &e)
	return e, err
}
