package main

import (
	"context"
	"iter"
	"time"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
)

func (f *fakeVM) Migrations() []vmm.MigrationRecord { return f.records }

func (f *fakeVM) SameMigration(_ string, opt migrate.Options) (vmm.MigrationRecord, bool, error) {
	for _, r := range f.records {
		if r.ID == opt.ID {
			return r, true, nil
		}
	}
	return vmm.MigrationRecord{}, false, nil
}

func (f *fakeVM) CheckMigration(_ context.Context, to string, opt migrate.Options) (migrate.CheckResult, error) {
	time.Sleep(f.slow)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.to, f.opt = to, opt
	r := f.check
	r.Address = to
	return r, nil
}

func (f *fakeVM) Events(_ context.Context, after uint64, _ bool) (iter.Seq[vmm.Event], error) {
	return func(yield func(vmm.Event) bool) {
		for _, e := range f.events {
			if e.Seq > after && !yield(e) {
				return
			}
		}
	}, nil
}

func (f *fakeVM) Stats() vmm.Stats { return f.stats }

func (f *fakeVM) Standing() <-chan struct{} { return f.standing }
