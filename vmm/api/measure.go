package api

import (
	"context"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/govmm/govmm/migrate"
)

// DirtyRateRequest is the body of POST /v1/dirty-rate.
type DirtyRateRequest struct {
	Interval Duration `json:"interval,omitempty" doc:"for how long to watch what the guest writes"` // 0: migrate.DefaultRateInterval
}

// EstimateRequest is the body of POST /v1/migration/estimate: the options of a
// migration, and for how long to watch what the guest writes.
type EstimateRequest struct {
	MigrateRequest
	Interval Duration `json:"interval,omitempty" doc:"for how long to watch what the guest writes"` // 0: migrate.DefaultRateInterval
}

// interval fills in the default.
func (d Duration) interval() time.Duration {
	if d == 0 {
		return migrate.DefaultRateInterval
	}
	return time.Duration(d)
}

// registerMeasurements adds what looks at how the guest writes.
func (s *Server) registerMeasurements(a huma.API) {
	register(a, operation(http.MethodPost, "/v1/dirty-rate", "measure-dirty-rate", "Measure how fast the guest writes its memory"),
		func(ctx context.Context, in *struct{ Body *DirtyRateRequest }) (*answer[migrate.DirtyRate], error) {
			var interval Duration
			if in.Body != nil {
				interval = in.Body.Interval
			}
			rate, err := s.vm.MeasureDirtyRate(ctx, interval.interval())
			return &answer[migrate.DirtyRate]{rate}, err
		})
	register(a, operation(http.MethodPost, "/v1/migration/estimate", "estimate-migration", "Predict what a migration would take"),
		func(ctx context.Context, in *struct{ Body EstimateRequest }) (*answer[migrate.Estimate], error) {
			opt, err := in.Body.Options()
			if err != nil {
				return nil, err
			}
			e, err := s.vm.EstimateMigration(ctx, in.Body.To, opt, in.Body.Interval.interval())
			return &answer[migrate.Estimate]{e}, err
		})
	register(a, operation(http.MethodPost, "/v1/migration/check", "check-migration", "Ask a destination whether it would take the guest, with everything that is in the way; nothing is moved"),
		func(ctx context.Context, in *struct{ Body MigrateRequest }) (*answer[migrate.CheckResult], error) {
			opt, err := in.Body.Options()
			if err != nil {
				return nil, err
			}
			ctx, cancel := context.WithTimeout(ctx, checkTime)
			defer cancel()
			r, err := s.vm.CheckMigration(ctx, in.Body.To, opt)
			return &answer[migrate.CheckResult]{r}, err
		})
}

// checkTime bounds what a check takes.
const checkTime = time.Minute

// CheckMigration asks a destination whether it would take the guest; nothing is moved. The
// end of ctx ends it.
func (c *Client) CheckMigration(ctx context.Context, req MigrateRequest) (migrate.CheckResult, error) {
	var r migrate.CheckResult
	err := c.callWithin(ctx, c.Timeout+checkTime, http.MethodPost, "/v1/migration/check", req, &r)
	return r, err
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
