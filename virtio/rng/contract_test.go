package rng

import (
	"testing"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// A driver that keeps to no rule does not keep the device from being paused and
// reset.
func TestHostileDriver(t *testing.T) {
	virtiotest.Hostile{New: func(testing.TB, *virtiotest.Memory) virtio.Device { return New(Config{}) }}.Attack(t)
}
