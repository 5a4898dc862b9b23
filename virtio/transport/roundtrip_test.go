package transport_test

import (
	"testing"

	"github.com/govmm/govmm/virtio"
	"pgregory.net/rapid"
)

// Whatever a driver has written to the registers, in whatever order and however
// far it has come, another machine saves what it loaded (in guest.dst).
func TestStateRoundTrip(t *testing.T) {
	outer := t
	rapid.Check(t, func(t *rapid.T) {
		g := newGuest(outer)
		switch rapid.IntRange(0, 3).Draw(t, "driver") {
		case 0:
		case 1:
			g.negotiate(virtio.FeatureVersion1)
		default:
			d := g.start(rapid.SampledFrom([]uint64{virtio.FeatureVersion1, virtio.FeatureVersion1 | virtio.FeatureEventIdx, allFeatures}).Draw(t, "features"))
			for range rapid.IntRange(0, 5).Draw(t, "requests") {
				g.echoed(d[1], 1, rapid.StringMatching("[a-z]{1,20}").Draw(t, "text"), g.interrupted(1))
			}
		}
		for range rapid.IntRange(0, 20).Draw(t, "writes") {
			// Selectors, vectors, features; the table; the device's own.
			at := rapid.SampledFrom([]uint64{common, common + 8, common + 12, common + 16, common + 22, common + 26, table, table + 8, table + 12, table + 28, device + 4}).Draw(t, "at")
			n := 4
			if at >= common+16 && at < common+0x1000 {
				n = 2
			}
			g.write(at, n, uint64(rapid.Uint32().Draw(t, "value")>>rapid.IntRange(0, 31).Draw(t, "shift")))
		}
		g.dst()
	})
}
