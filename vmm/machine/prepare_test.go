package machine

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/rng"
)

// slowSpec is a device whose storage is slow: each Sync waits for an answer.
type slowSpec struct {
	rng.Spec
	answers        chan error
	syncs, unlocks atomic.Int32
}

func (s *slowSpec) Open(log *slog.Logger) (virtio.Backend, error) {
	b, err := s.Spec.Open(log)
	return &slowBackend{b, s}, err
}

type slowBackend struct {
	virtio.Backend
	spec *slowSpec
}

func (b *slowBackend) Sync() error {
	b.spec.syncs.Add(1)
	return <-b.spec.answers
}

func (b *slowBackend) Lock() error { return nil }

func (b *slowBackend) Unlock(context.Context) error {
	b.spec.unlocks.Add(1)
	return nil
}

// TestPrepareStop: disks are flushed while the guest runs, and not when it is stopped.
// Storage that does not answer is left alone when the context ends, and asked once at a time.
func TestPrepareStop(t *testing.T) {
	slow := &slowSpec{answers: make(chan error)}
	spec := testSpec(t, 1, vmtest.JustCount, slow)
	m := fromSpec(t, spec, nil)
	check(t, m.Boot())
	check(t, m.Start(false))
	src := m.Source()

	ctx, cancel := context.WithCancelCause(t.Context())
	prepared := make(chan error, 1)
	go func() { prepared <- src.PrepareStop(ctx) }()
	before := word(t, m, vmtest.CountAt)
	awaitChange(t, m, vmtest.CountAt, before) // it runs meanwhile
	cancel(errLate)
	if err := <-prepared; !errors.Is(err, errLate) {
		t.Errorf("PrepareStop: %v", err)
	}
	// The first call is still under way, and nothing else of the machine waits for it.
	if err := src.PrepareStop(ctx); !errors.Is(err, errLate) {
		t.Errorf("PrepareStop: %v", err)
	}
	wasRunning, err := src.PauseForHandoff(vmtest.Within(t))
	check(t, err)
	if !wasRunning {
		t.Error("the guest did not run")
	}
	// It is not unlocked before.
	if err := src.YieldForHandoff(ctx); !errors.Is(err, errLate) || slow.unlocks.Load() != 0 {
		t.Errorf("YieldForHandoff: %v, %d unlocks", err, slow.unlocks.Load())
	}
	check(t, src.ResumeAfterAbort(vmtest.Within(t)))
	before = word(t, m, vmtest.CountAt)
	awaitChange(t, m, vmtest.CountAt, before)
	if n := slow.syncs.Load(); n != 1 {
		t.Errorf("%d syncs under way", n)
	}

	slow.answers <- nil
	go func() { prepared <- src.PrepareStop(t.Context()) }()
	broken := errors.New("broken on purpose")
	slow.answers <- broken
	if err := <-prepared; !errors.Is(err, broken) {
		t.Errorf("PrepareStop: %v", err)
	}
	// It fails again in Unlock, if it must.
	_, err = src.PauseForHandoff(vmtest.Within(t))
	check(t, err)
	check(t, src.YieldForHandoff(vmtest.Within(t)))
	if n := slow.unlocks.Load(); n != 1 {
		t.Errorf("%d unlocks", n)
	}
}
