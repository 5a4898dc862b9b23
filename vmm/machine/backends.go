package machine

import (
	"context"
	"errors"
	"log/slog"

	"github.com/govmm/govmm/virtio"
)

// backends are what the devices of a machine hold of the host, in the order of
// the devices. They outlive a machine that is reset.
type backends []virtio.Backend

// openBackends opens what the devices need of this host, which their specs note.
// The error lists everything that is not available, or is not what the guest
// knows. Nothing is locked yet.
func openBackends(devices []virtio.Spec, log *slog.Logger) (backends, error) {
	var b backends
	var errs []error
	for _, d := range devices {
		opened, err := d.Open(log.With("device", d.String()))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		b = append(b, opened)
	}
	if errs != nil {
		return nil, errors.Join(append(errs, b.close())...)
	}
	return b, nil
}

// eachOf calls f for every backend that is also a T.
func eachOf[T any](b backends, f func(T) error) error {
	var errs []error
	for _, one := range b {
		if t, ok := one.(T); ok {
			errs = append(errs, f(t))
		}
	}
	return errors.Join(errs...)
}

// lock takes what only the side that runs the guest may hold: all of it, or
// nothing. It may be called when it is held.
func (b backends) lock() error {
	if err := eachOf(b, virtio.Locker.Lock); err != nil {
		return errors.Join(err, b.unlock(context.Background()))
	}
	return nil
}

// unlock makes all writes durable and gives up what lock took. The devices are
// paused. After an error some of it may still be held.
func (b backends) unlock(ctx context.Context) error {
	return eachOf(b, func(l virtio.Locker) error { return l.Unlock(ctx) })
}

// sync makes durable what was written so far, so that little is left to do when
// the guest stands still. What fails here fails again in unlock, which reports it.
func (b backends) sync() { _ = eachOf(b, virtio.Syncer.Sync) }

// announce tells others where the guest is now.
func (b backends) announce() {
	_ = eachOf(b, func(a virtio.Announcer) error { a.Announce(); return nil })
}

func (b backends) close() error { return eachOf(b, virtio.Backend.Close) }
