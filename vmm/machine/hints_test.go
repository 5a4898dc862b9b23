package machine

import "testing"

// TestNoBalloonNoHints: the source of a machine without a balloon has a nil
// HintSource, not an interface that holds a nil pointer.
func TestNoBalloonNoHints(t *testing.T) {
	if s := (&source{Machine: new(Machine)}).HintSource(); s != nil {
		t.Errorf("hints from %v", s)
	}
}
