package migrate

import (
	"testing"
	"time"
)

func TestBrakeRaisesInSteps(t *testing.T) {
	now := time.Now()
	var b brake
	if b.round(100, 50, now) || b.round(100, 10, now) {
		t.Error("the guest is slowed down though rounds shrink")
	}
	if b.round(100, 100, now) {
		t.Error("one round that does not shrink is enough")
	}
	if !b.round(100, 90, now) || b.percent != throttleFirst {
		t.Errorf("two do not raise: %d%%", b.percent)
	}
	for range 2 {
		if b.round(100, 100, now) {
			t.Error("raised again before the first step could show")
		}
	}
	now = now.Add(throttlePause)
	if !b.round(100, 100, now) || b.percent != throttleFirst+throttleStep {
		t.Errorf("second step: %d%%", b.percent)
	}
	b.round(100, 20, now)
	if b.stalled != 0 {
		t.Error("a round that shrinks is not noticed")
	}
	for range 100 {
		now = now.Add(throttlePause)
		b.round(100, 100, now)
	}
	if b.percent != throttleMost {
		t.Errorf("it ends at %d%%", b.percent)
	}
}
