package migrate

import "testing"

// The result of any number of rounds has a bounded size, has the first and the last of
// them, and counts all.
func TestManyRounds(t *testing.T) {
	var m meter
	m.wire = func() uint64 { return 0 }
	const n = 3 * maxRounds
	for i := range n {
		m.beginRound(i, 2)
		m.span(1, 1, 0)
		m.endRound()
	}
	m.finish(PhaseFailed, ErrTimeout)
	r := m.snapshotResult()
	if r.PagesSent != n || r.PagesZero != n {
		t.Errorf("counted %d pages and %d zero ones of %d", r.PagesSent, r.PagesZero, n)
	}
	if len(r.Rounds) != maxRounds || r.Rounds[0].N != 0 || r.Rounds[maxRounds/2-1].N != maxRounds/2-1 || r.Rounds[maxRounds-1].N != n-1 {
		t.Errorf("%d rounds, from %d to %d", len(r.Rounds), r.Rounds[0].N, r.Rounds[len(r.Rounds)-1].N)
	}
}
