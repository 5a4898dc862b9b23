package migrate

import (
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// The parts of a downtime add up, whatever the destination reports.
func TestDowntimePartsAddUp(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := startWatch()
		w.began = w.began.Add(-time.Second)
		w.parts.Pause, w.parts.Pages = 400*time.Millisecond, 350*time.Millisecond
		w.last = w.began.Add(750 * time.Millisecond)
		far := rapid.Int64Range(0, int64(forever))
		w.parts.Load, w.parts.Resume = time.Duration(far.Draw(t, "load")), time.Duration(far.Draw(t, "resume"))
		took, parts := w.finish()
		if sum := parts.Sum(); (sum - took).Abs() > 2*time.Millisecond {
			t.Fatalf("%+v add up to %v, not %v", parts, sum, took)
		}
		if parts.Load < 0 || parts.Resume < 0 || parts.Wire < 0 {
			t.Fatalf("%+v", parts)
		}
	})
}

func TestDowntimeNote(t *testing.T) {
	const ms = time.Millisecond
	p := expectedStop{limit: 100 * ms, parts: Downtime{Pause: 1 * ms, Load: 4 * ms, Pages: 60 * ms, Wire: 2 * ms}}
	if s := p.note(119*time.Millisecond, Downtime{}); s != "" {
		t.Errorf("within 1.2 times the limit: %q", s)
	}
	for want, parts := range map[string]Downtime{
		"sending the last pages took 182.0 ms, expected 62.0":             {Pause: 2 * ms, Pages: 80 * ms, Wire: 102 * ms, Load: 4 * ms},
		"loading the state at the destination took 90.0 ms, expected 4.0": {Load: 90 * ms, Pages: 50 * ms, Pause: 50 * ms},
		"stopping the vCPUs and devices took 130.0 ms, expected 1.0":      {Pause: 130 * ms, Pages: 10 * ms},
		"saving the state":               {State: 130 * ms, Pages: 10 * ms},
		"the last sync of the dirty log": {LastSync: 130 * ms, Pages: 10 * ms},
		"resuming at the destination":    {Resume: 130 * ms, Pages: 10 * ms},
	} {
		s := p.note(184*time.Millisecond, parts)
		if !strings.Contains(s, "184.0 ms") || !strings.Contains(s, "limit was 100ms") || !strings.Contains(s, want) {
			t.Errorf("%q, want %q", s, want)
		}
	}
}

// PREPARED and RUNNING that say nothing, or nonsense, are errors; the longest
// time that they can say is bounded.
func TestTook(t *testing.T) {
	for payload, want := range map[string]time.Duration{
		"\xa1\x62us\x19\x05\xdc":                         1500 * time.Microsecond,
		"\xa1\x62us\x1b\xff\xff\xff\xff\xff\xff\xff\xff": forever,
	} {
		if d, _, err := decodeTook(reply{header{typ: framePrepared}, []byte(payload)}); d != want || err != nil {
			t.Errorf("%q: %v, %v", payload, d, err)
		}
	}
	for _, payload := range []string{"", "nonsense"} {
		if _, _, err := decodeTook(reply{header{typ: framePrepared}, []byte(payload)}); err == nil {
			t.Errorf("%q was taken", payload)
		}
	}
}
