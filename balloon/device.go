package balloon

import (
	"context"
	"errors"

	"github.com/govmm/govmm/virtio"
)

var (
	_ virtio.Device        = (*Balloon)(nil)
	_ virtio.QueueResetter = (*Balloon)(nil)
)

// ID is the device type.
func (b *Balloon) ID() uint16 { return virtio.IDBalloon }

// Features are those that the device offers, always all of them: Linux before
// 6.11 numbers the queues by what was offered (see [Balloon.Activate]).
func (b *Balloon) Features() uint64 {
	return FeatureStats | FeatureDeflateOnOOM | FeatureFreePageHint | FeaturePagePoison | FeatureReporting
}

// QueueSizes is the size of each queue.
func (b *Balloon) QueueSizes() []uint16 {
	sizes := make([]uint16, queueCount)
	for i := range sizes {
		sizes[i] = queueSize
	}
	return sizes
}

// Activate starts serving the queues. Section 5.5.2 gives each queue a number
// of its own; drivers are about that leave none out, and so have the reporting
// queue in the place of the hint queue when they do not hint. Such a queue is
// found by being enabled where there should be none.
func (b *Balloon) Activate(features uint64, queues []*virtio.Queue, n virtio.Notifier) error {
	b.config.Lock()
	b.active, b.features, b.notifier, b.waiting = true, features, n, 0
	if features&FeatureFreePageHint != 0 {
		b.hintQueue = queues[hintQueue]
	}
	b.config.Unlock()

	b.workers = []*virtio.Worker{
		virtio.StartWorker(queues[inflateQueue], n, (&pfnServer{b: b, n: n, punch: true}).serve),
		virtio.StartWorker(queues[deflateQueue], n, (&pfnServer{b: b, n: n}).serve),
	}
	if features&FeatureStats != 0 {
		b.stats = startStats(b, queues[statsQueue], n)
	}
	if features&FeatureFreePageHint != 0 {
		b.hints = startHints(b, queues[hintQueue], n)
	}
	if features&FeatureReporting != 0 {
		q := queues[reportQueue]
		if features&FeatureFreePageHint == 0 && q.Size() == 0 {
			q = queues[hintQueue]
		}
		b.workers = append(b.workers, virtio.StartWorker(q, n, b.report))
	}
	return nil
}

// Reset stops serving and forgets what the driver said. The host's wish, the
// target, stays, and so does the counter of command ids.
func (b *Balloon) Reset() {
	for _, w := range b.workers {
		w.Stop()
	}
	if b.stats != nil {
		b.stats.loop.end()
	}
	if b.hints != nil {
		b.hints.loop.end()
	}
	hinting := b.hints != nil
	b.workers, b.stats, b.hints = nil, nil, nil

	b.config.Lock()
	b.active, b.features, b.notifier = false, 0, nil
	b.hintQueue, b.waiting = nil, 0
	b.state.Actual, b.state.Poison, b.state.Command = 0, 0, CommandStop
	sink := b.sink
	b.config.Unlock()
	b.statsBox.forget()
	if hinting && sink != nil {
		sink.HintLost()
	}
}

// Pause returns when no request is being served. If ctx ends first, everything
// goes on.
func (b *Balloon) Pause(ctx context.Context) error {
	if err := b.pause(ctx); err != nil {
		return errors.Join(err, b.Resume())
	}
	return nil
}

func (b *Balloon) pause(ctx context.Context) error {
	for _, w := range b.workers {
		if err := w.Pause(ctx); err != nil {
			return err
		}
	}
	for _, l := range b.loops() {
		if err := l.pause(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Resume undoes Pause.
func (b *Balloon) Resume() error {
	for _, w := range b.workers {
		w.Resume()
	}
	for _, l := range b.loops() {
		l.resume()
	}
	return nil
}

// ResetQueue gives back the buffer of the statistics queue, which waits there
// for the host to ask.
func (b *Balloon) ResetQueue(index int) {
	if index == statsQueue && b.stats != nil {
		b.stats.loop.call(b.stats.drop)
	}
}

func (b *Balloon) loops() []*loop {
	var all []*loop
	if b.stats != nil {
		all = append(all, b.stats.loop)
	}
	if b.hints != nil {
		all = append(all, b.hints.loop)
	}
	return all
}

// Close has nothing to give back.
func (b *Balloon) Close() error { return nil }
