package machine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/virtio"
)

// backends are what the devices of a machine hold of the host. They outlive a
// machine that is reset. What each of them is besides is found out when they are
// opened: an interface's first type assertion takes long, compared with a stop.
type backends struct {
	all        []virtio.Backend // in the order of the devices
	names      []string         // of these devices
	lockers    []virtio.Locker
	syncers    []*syncer
	samplers   []virtio.Sampler
	announcers []virtio.Announcer
}

// openBackends opens what the devices need of this host, which their specs note.
// The error lists everything that is not available, or is not what the guest
// knows. Nothing is locked yet.
// open opens one of them; nil: by its Open. failed gives the error of a device its form; nil: as it is.
func openBackends(devices []virtio.Spec, log *slog.Logger, open func(i int, d virtio.Spec, log *slog.Logger) (virtio.Backend, error), failed func(i int, err error) error) (b backends, err error) {
	if open == nil {
		open = func(_ int, d virtio.Spec, log *slog.Logger) (virtio.Backend, error) { return d.Open(log) }
	}
	var errs []error
	for i, d := range devices {
		opened, err := open(i, d, log.With("device", d.String()))
		if err != nil {
			if failed != nil {
				err = failed(i, err)
			}
			errs = append(errs, err)
			continue
		}
		b.all, b.names = append(b.all, opened), append(b.names, d.String())
		if l, ok := opened.(virtio.Locker); ok {
			b.lockers = append(b.lockers, l)
		}
		if s, ok := opened.(virtio.Syncer); ok {
			b.syncers = append(b.syncers, &syncer{Syncer: s})
		}
		if s, ok := opened.(virtio.Sampler); ok {
			b.samplers = append(b.samplers, s)
		}
		if a, ok := opened.(virtio.Announcer); ok {
			b.announcers = append(b.announcers, a)
		}
	}
	if errs != nil {
		return backends{}, errors.Join(append(errs, b.close(new(step)))...)
	}
	return b, nil
}

// lock takes what only the side that runs the guest may hold: all of it, or
// nothing. It may be called when it is held.
func (b backends) lock() error {
	var errs []error
	for _, l := range b.lockers {
		errs = append(errs, l.Lock())
	}
	if err := errors.Join(errs...); err != nil {
		return errors.Join(err, b.unlock(context.Background()))
	}
	return nil
}

// unlock makes all writes durable and gives up what lock took. The devices are
// paused. After an error some of it may still be held.
func (b backends) unlock(ctx context.Context) error {
	// A sync that was left alone may still be under way.
	for _, s := range b.syncers {
		if err := s.idle(ctx); err != nil {
			return err
		}
	}
	var errs []error
	for _, l := range b.lockers {
		errs = append(errs, l.Unlock(ctx))
	}
	return errors.Join(errs...)
}

// sync makes durable what was written so far, on all backends at once.
func (b backends) sync(ctx context.Context) error {
	for _, s := range b.syncers {
		if err := s.idle(ctx); err != nil {
			return err
		}
		s.start()
	}
	var errs []error
	for _, s := range b.syncers {
		err := s.idle(ctx)
		if err == nil {
			err = s.err
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// syncer is a [virtio.Syncer] that can be left alone: a system call cannot be called
// back. At most one Sync of it is under way. It belongs to the migration under way.
type syncer struct {
	virtio.Syncer
	running chan struct{} // closed when Sync has returned; nil: none has been called
	err     error         // of Sync; read when running is closed
}

// start begins a Sync. None is under way.
func (s *syncer) start() {
	running := make(chan struct{})
	s.running = running
	go func() {
		defer close(running)
		s.err = s.Sync()
	}()
}

// idle waits until no Sync is under way, or ctx ends.
func (s *syncer) idle(ctx context.Context) error {
	if s.running == nil {
		return nil
	}
	select {
	case <-s.running:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// sample describes the data of devices that does not travel, for compare at the
// destination.
func (b backends) sample(ctx context.Context, nonce [16]byte) ([]byte, error) {
	samples := make([][]byte, len(b.samplers))
	err := b.eachSampler(func(i int, s virtio.Sampler) (err error) {
		samples[i], err = s.Sample(ctx, nonce)
		return err
	})
	if err != nil {
		return nil, err
	}
	return strictcbor.Marshal(samples)
}

// compare fails if the data is not that of the samples, which a peer has sent.
func (b backends) compare(ctx context.Context, nonce [16]byte, encoded []byte) error {
	var samples [][]byte
	if err := strictcbor.Unmarshal(encoded, &samples); err != nil {
		return kind.Told(fmt.Errorf("decode the samples of the guest's storage: %w", err))
	}
	if len(samples) != len(b.samplers) {
		return kind.Told(fmt.Errorf("samples of the guest's storage: expected %d, found %d", len(b.samplers), len(samples)))
	}
	return b.eachSampler(func(i int, s virtio.Sampler) error { return s.Compare(ctx, nonce, samples[i]) })
}

// eachSampler calls f for each of the samplers, for all at once.
func (b backends) eachSampler(f func(int, virtio.Sampler) error) error {
	errs := make([]error, len(b.samplers))
	var all sync.WaitGroup
	for i, s := range b.samplers {
		all.Go(func() { errs[i] = f(i, s) })
	}
	all.Wait()
	return errors.Join(errs...)
}

// announce tells others where the guest is now.
func (b backends) announce() {
	for _, a := range b.announcers {
		a.Announce()
	}
}

// close gives everything back, and says in at with what it has begun.
func (b backends) close(at *step) error {
	var errs []error
	for i, one := range b.all {
		at.begin(b.names[i] + ": its end, on this host")
		errs = append(errs, one.Close())
	}
	return errors.Join(errs...)
}
