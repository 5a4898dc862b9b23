package machine

import (
	"context"
	"errors"
	"log/slog"

	"github.com/govmm/govmm/virtio"
)

// backends are what the devices of a machine hold of the host. They outlive a
// machine that is reset. What each of them is besides is found out when they are
// opened: an interface's first type assertion takes long, compared with a stop.
type backends struct {
	all        []virtio.Backend // in the order of the devices
	lockers    []virtio.Locker
	syncers    []*syncer
	announcers []virtio.Announcer
}

// openBackends opens what the devices need of this host, which their specs note.
// The error lists everything that is not available, or is not what the guest
// knows. Nothing is locked yet.
func openBackends(devices []virtio.Spec, log *slog.Logger) (b backends, err error) {
	var errs []error
	for _, d := range devices {
		opened, err := d.Open(log.With("device", d.String()))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		b.all = append(b.all, opened)
		if l, ok := opened.(virtio.Locker); ok {
			b.lockers = append(b.lockers, l)
		}
		if s, ok := opened.(virtio.Syncer); ok {
			b.syncers = append(b.syncers, &syncer{Syncer: s})
		}
		if a, ok := opened.(virtio.Announcer); ok {
			b.announcers = append(b.announcers, a)
		}
	}
	if errs != nil {
		return backends{}, errors.Join(append(errs, b.close())...)
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

// announce tells others where the guest is now.
func (b backends) announce() {
	for _, a := range b.announcers {
		a.Announce()
	}
}

func (b backends) close() error {
	var errs []error
	for _, one := range b.all {
		errs = append(errs, one.Close())
	}
	return errors.Join(errs...)
}
