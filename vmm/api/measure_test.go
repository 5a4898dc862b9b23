package api_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
)

func TestDirtyRateAndEstimate(t *testing.T) {
	vm := &fakeVM{}
	c, _ := serve(t, t.TempDir(), "db", vm)
	ctx := context.Background()
	rate, err := c.DirtyRate(ctx, api.DirtyRateRequest{})
	if err != nil || rate.Interval != time.Second || rate.Pages != 512 || len(rate.Samples) != 2 {
		t.Errorf("%+v, %v", rate, err)
	}
	req := api.EstimateRequest{MigrateRequest: api.MigrateRequest{To: "h:1", DowntimeLimit: api.Duration(50 * time.Millisecond)},
		Interval: api.Duration(20 * time.Millisecond)}
	e, err := c.Estimate(ctx, req)
	if err != nil || !e.Converges || e.Rounds != 3 || e.DirtyRate.Interval != 20*time.Millisecond || vm.addr != "h:1" {
		t.Errorf("%+v, %v", e, err)
	}
	req.To = "nowhere"
	if _, err := c.Estimate(ctx, req); !errors.Is(err, vmm.ErrInvalid) {
		t.Errorf("an address without a port: %v", err)
	}
	vm.err = vmm.ErrState
	if _, err := c.DirtyRate(ctx, api.DirtyRateRequest{}); !errors.Is(err, vmm.ErrState) {
		t.Errorf("refused: %v", err)
	}
}
