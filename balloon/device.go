package balloon

import (
	"context"
	"fmt"

	"github.com/govmm/govmm/virtio"
)

var _ virtio.Device = (*Balloon)(nil)

// ID is the device type.
func (b *Balloon) ID() uint16 { return virtio.IDBalloon }

// Features are always all features: Linux before 6.11 numbers the queues by those
// that are offered (see [Balloon.Activate]).
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

// Activate starts serving the queues. Section 5.5.2 gives each queue a fixed
// number, but some drivers number the queues that they use one after the other,
// and have the reporting queue in the place of the hint queue if they do not
// hint. Activate finds that by the queue that is enabled.
func (b *Balloon) Activate(features uint64, queues []*virtio.Queue, n virtio.Notifier) error {
	b.config.Lock()
	b.active, b.features, b.notifier, b.waiting = true, features, n, 0
	if features&FeatureFreePageHint != 0 {
		b.hintQueue = queues[hintQueue]
	}
	b.config.Unlock()

	b.loop = virtio.NewLoop(n)
	b.start(virtio.Server{Queue: queues[inflateQueue], Serve: (&pfnServer{b: b, loop: b.loop, punch: true}).serve})
	b.start(virtio.Server{Queue: queues[deflateQueue], Serve: (&pfnServer{b: b, loop: b.loop}).serve})
	if features&FeatureStats != 0 {
		b.loop.Start(b.stats.task(queues[statsQueue]))
	}
	if features&FeatureFreePageHint != 0 {
		h := &hintServer{b: b}
		b.start(virtio.Server{Queue: queues[hintQueue], Serve: h.serve, Empty: h.empty})
	}
	if features&FeatureReporting != 0 {
		q := queues[reportQueue]
		if features&FeatureFreePageHint == 0 && q.Size() == 0 {
			q = queues[hintQueue]
		}
		b.start(virtio.Server{Queue: q, Serve: b.report})
	}
	return nil
}

// start serves a queue in a task of its own.
func (b *Balloon) start(s virtio.Server) { b.loop.Start(virtio.Task{Servers: []virtio.Server{s}}) }

// Reset stops serving and discards what the driver has set. The target and the
// counter of command ids stay.
func (b *Balloon) Reset() {
	b.loop.Stop()
	b.loop = nil

	b.config.Lock()
	hinting := b.hintQueue != nil
	b.active, b.features, b.notifier = false, 0, nil
	b.hintQueue, b.waiting = nil, 0
	b.state.Actual, b.state.Poison, b.state.Command = 0, 0, CommandStop
	sink := b.sink
	b.config.Unlock()
	b.stats.forget()
	if hinting && sink != nil {
		sink.HintLost()
	}
}

// Pause returns when no request is being served. If ctx ends first, the device
// goes on.
func (b *Balloon) Pause(ctx context.Context) error {
	if err := b.loop.Pause(ctx); err != nil {
		return fmt.Errorf("balloon: %w", err)
	}
	return nil
}

// Resume undoes Pause.
func (b *Balloon) Resume() error {
	b.loop.Resume()
	return nil
}

// ResetQueue implements [virtio.Device]. The device keeps the buffer of the
// statistics queue.
func (b *Balloon) ResetQueue(q *virtio.Queue) { b.loop.ResetQueue(q) }

// Close has nothing to give back.
func (b *Balloon) Close() error { return nil }
