package balloon_test

import (
	"context"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
)

func stat(p []byte, tag uint16, v uint64) []byte {
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint16(p, tag), v)
}

// sendStats is the driver's part: it fills the buffer and makes it available.
func (r *rig) sendStats(p []byte) {
	r.t.Helper()
	r.send(stats, []virtiotest.Buffer{r.put(p)}, nil)
}

// poll asks for statistics, with a driver that fills its buffer, whenever it
// gets it back, with what fill returns.
func (r *rig) poll(fill func() []byte) balloon.Stats {
	r.t.Helper()
	polled := make(chan balloon.Stats)
	go func() {
		s, err := r.b.PollStats(ctx(r.t))
		if err != nil {
			r.t.Error(err)
		}
		polled <- s
	}()
	for {
		for {
			if _, ok := r.drivers[stats].Used(); !ok {
				break
			}
			r.sendStats(fill())
		}
		select {
		case s := <-polled:
			return s
		case <-r.irq[stats]:
		}
	}
}

// holdStats returns when the device holds the driver's buffer.
func (r *rig) holdStats() {
	r.t.Helper()
	r.sendStats(stat(nil, 0, 5))
	r.poll(func() []byte { return stat(nil, 0, 5) })
}

func TestStatistics(t *testing.T) {
	r := newRig(t, allOf)
	if _, ok := r.b.Stats(); ok {
		t.Error("statistics from nowhere")
	}
	first := append(stat(stat(stat(nil, 4, 1000), 5, 2000), 999, 3), 1, 2, 3)
	r.sendStats(first)
	s := r.poll(func() []byte { return first })
	if s.Free == nil || *s.Free != 1000 || s.Total == nil || *s.Total != 2000 || s.SwapIn != nil || s.At.IsZero() {
		t.Errorf("got %+v", s)
	}
	// To be asked is to get the buffer back.
	n := uint64(0)
	for range 5 {
		before := n
		s := r.poll(func() []byte { n++; return stat(nil, 4, n) })
		if s.Free == nil || *s.Free != n || n != before+1 || s.Total != nil {
			t.Errorf("got %+v, filled %d times", s, n)
		}
	}
	r.noReset()
}

// The buffer is not out while the device is paused, and the device has it again
// afterwards, here and elsewhere.
func TestStatisticsMove(t *testing.T) {
	r := newRig(t, allOf)
	r.holdStats()
	check(t, r.b.Pause(ctx(t)))
	var saved []virtio.QueueState
	for _, q := range r.queues {
		s, err := q.SaveState()
		check(t, err)
		saved = append(saved, s)
	}
	state, err := r.b.SaveState()
	check(t, err)
	r.b.Reset()

	r.newDevice()
	check(t, r.b.LoadState(state))
	for i, q := range r.queues {
		check(t, q.Start(saved[i], r.features))
	}
	check(t, r.b.Activate(r.features, r.queues, r))
	for _, q := range r.queues {
		q.Signal()
	}
	if s := r.poll(func() []byte { return stat(nil, 0, 5) }); s.SwapIn == nil || *s.SwapIn != 5 {
		t.Errorf("got %+v", s)
	}
	r.noReset()
}

func TestStatisticsOfNoDriver(t *testing.T) {
	r := newRig(t, allOf&^balloon.FeatureStats)
	if _, err := r.b.PollStats(ctx(t)); !errors.Is(err, balloon.ErrNoStats) {
		t.Error(err)
	}
	// A guest that does not answer is waited for as long as is said.
	r = newRig(t, allOf)
	c, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := r.b.PollStats(c); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	// One whose driver goes has no answer.
	asked := make(chan error)
	go func() {
		_, err := r.b.PollStats(ctx(t))
		asked <- err
	}()
	r.b.Reset()
	if err := <-asked; err == nil {
		t.Error("statistics from a driver that has gone")
	}
}

// A queue that the driver resets gets its buffer dropped; in a pause there is
// none to drop.
func TestResetOfTheStatisticsQueue(t *testing.T) {
	r := newRig(t, allOf)
	r.holdStats()
	r.queues[stats].Stop()
	r.b.ResetQueue(r.queues[stats])
	r.queues[stats].Drain()
	check(t, r.b.Pause(ctx(t)))
	r.b.ResetQueue(r.queues[stats])
	check(t, r.b.Resume())
	r.noReset()
}

// Two buffers are one too many: the first comes back.
func TestTwoStatisticsBuffers(t *testing.T) {
	r := newRig(t, allOf)
	a, b := stat(nil, 0, 1), stat(nil, 1, 2)
	r.send(stats, []virtiotest.Buffer{r.put(append(a, b...))}, nil)
	r.send(stats, []virtiotest.Buffer{{GPA: r.data, Len: 1 << 16}}, nil)
	<-r.irq[stats]
	if _, ok := r.drivers[stats].Used(); !ok || r.drivers[stats].InFlight() != 1 {
		t.Errorf("%d in flight", r.drivers[stats].InFlight())
	}
	r.noReset()
}
