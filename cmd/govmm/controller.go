package main

import (
	"context"
	"errors"
	"time"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
)

// controller is the VM as its API sees it.
type controller struct {
	vm     *vmm.VM
	socket string
}

func (c *controller) Info() api.Info {
	i := c.vm.Info()
	return api.Info{
		Name: i.Name, PID: i.PID, State: string(i.State), Address: i.Address, CPUs: i.CPUs, Memory: i.Memory,
		Kernel: i.Kernel, Panicked: i.Panicked, Devices: apiDevices(i.Devices),
		Socket: c.socket, Migration: i.Migration, Incoming: i.Incoming,
	}
}

func (c *controller) Pause() error            { return apiError(c.vm.Pause()) }
func (c *controller) Resume(force bool) error { return apiError(c.vm.Resume(force)) }
func (c *controller) Stop() error             { return apiError(c.vm.Stop()) }

func (c *controller) StartMigration(addr string, opt migrate.Options) (api.Migration, error) {
	m, err := c.vm.StartMigration(addr, opt)
	if err != nil {
		return nil, apiError(err)
	}
	return m, nil
}

func (c *controller) MeasureDirtyRate(ctx context.Context, interval time.Duration) (migrate.DirtyRate, error) {
	rate, err := c.vm.MeasureDirtyRate(ctx, interval)
	return rate, apiError(err)
}

func (c *controller) EstimateMigration(ctx context.Context, addr string, opt migrate.Options, interval time.Duration) (migrate.Estimate, error) {
	e, err := c.vm.EstimateMigration(ctx, addr, opt, interval)
	return e, apiError(err)
}

func (c *controller) Migration() api.Migration {
	if m := c.vm.Migration(); m != nil {
		return m
	}
	return nil // and not a nil pointer in an interface
}

// kindError is an error of vmm that matches what the API calls its kind.
type kindError struct {
	error
	kind error
}

func (e *kindError) Unwrap() []error { return []error{e.error, e.kind} }

func apiError(err error) error {
	switch {
	case errors.Is(err, vmm.ErrState):
		return &kindError{err, api.ErrState}
	case errors.Is(err, vmm.ErrInvalid):
		return &kindError{err, api.ErrInvalid}
	}
	return err
}
