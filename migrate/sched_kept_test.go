package migrate_test

import (
	"slices"
	"testing"
)

// The layouts of the kept schedules. Their places are, in this order, pages 0,
// 1, 64 and 65.
var (
	oneChunk     = layout{pages: []uint64{128}, shift: 7, manual: true, batch: 1}
	oneChunkSet  = layout{pages: []uint64{128}, shift: 7, manual: true, initiallySet: true, batch: 1}
	getThatClear = layout{pages: []uint64{128}, shift: 6, batch: 1}
)

// kept are schedules that the search, or rapid, found and shrank. Each shows what is wrong
// with a policy.
var kept = []struct {
	name     string
	policy   policy
	layout   layout
	undone   bool // otherwise lost
	page     uint8
	schedule schedule
}{
	{"a hint undone by the next sync", policyNeverClear, oneChunkSet, true, 0, schedule{
		{beginsEpoch, 0}, {announces, 0}, {guestSees, 0}, {guestHints, 0}, {hintsTake, 0}, {hintsTake, 0}, {hintsApply, 0}, {syncs, 0}}},

	// The hint leaves the page's bit in KVM's log and in fetched; the CLEAR for
	// its neighbour, which is to be sent, clears it.
	{"taken back while the hint was queued, then cleared with a neighbour", policyNeverClear, oneChunkSet, false, 0, schedule{
		{beginsEpoch, 0}, {announces, 0}, {guestSees, 0}, {guestHints, 0}, {guestWrites, 0},
		{hintsTake, 0}, {hintsTake, 0}, {hintsApply, 0}, {picks, 2}}},

	// The bit was set before, so that the write sets none; the CLEAR for the
	// hint clears it.
	{"taken back while the hint was queued", policyClearAtHint, oneChunkSet, false, 0, schedule{
		{beginsEpoch, 0}, {announces, 0}, {guestSees, 0}, {guestHints, 0}, {guestWrites, 0},
		{hintsTake, 0}, {hintsTake, 0}, {hintsApply, 0}}},
	{"taken back in the middle of the hint's CLEAR", policyClearAtHint, oneChunkSet, false, 0, schedule{
		{beginsEpoch, 0}, {announces, 0}, {guestSees, 0}, {guestHints, 0}, {hintsTake, 0}, {hintsTake, 0},
		{hintsApply, 0}, {goesOn, 0}, {guestWrites, 0}}},
	{"taken back while the hint was queued, and synced", policyClearAtHint, oneChunk, false, 1, schedule{
		{beginsEpoch, 0}, {announces, 0}, {guestSees, 0}, {guestHints, 1}, {hintsTake, 0}, {guestWrites, 1}, {syncs, 0},
		{hintsTake, 0}, {hintsApply, 0}}},

	// The refetch reports the page, and the pick of a neighbour clears it: when the
	// old hint comes, only writtenSince has the write.
	{"an old hint processed after a refetch", policyForgetful, oneChunk, false, 0, schedule{
		{beginsEpoch, 0}, {announces, 0}, {guestSees, 0}, {guestHints, 0}, {guestWrites, 0},
		{refetches, 0}, {picks, 2}, {goesOn, 0}, {goesOn, 0}, {goesOn, 0}, {hintsTake, 0}, {hintsTake, 0}, {hintsApply, 0}}},
	{"an old hint processed after a sync, GET clears", policyForgetful, getThatClear, false, 0, schedule{
		{beginsEpoch, 0}, {announces, 0}, {guestSees, 0}, {guestHints, 0}, {hintsTake, 0}, {hintsTake, 0}, {guestWrites, 0},
		{syncs, 0}, {hintsApply, 0}}},
	{"an old hint of a page that a device wrote", policyForgetful, oneChunk, false, 0, schedule{
		{beginsEpoch, 0}, {announces, 0}, {guestSees, 0}, {guestHints, 0}, {deviceWrites, 0}, {deviceMarks, 0},
		{refetches, 0}, {hintsTake, 0}, {hintsTake, 0}, {hintsApply, 0}}},
	{"an old hint processed after the last sync", policyForgetful, oneChunk, false, 1, schedule{
		{beginsEpoch, 0}, {announces, 0}, {guestSees, 0}, {guestHints, 1}, {hintsTake, 0}, {deviceWrites, 1}, {hintsTake, 0},
		{stopsGuest, 0}, {syncsLast, 0}, {hintsApply, 0}}},

	// The START buffer is the driver's variable. If it is read late it has the new id,
	// and the old hint after it counts as one that came after the arming.
	{"START read after its id had changed", policyImpatient, oneChunk, false, 0, schedule{
		{beginsEpoch, 0}, {announces, 0}, {guestSees, 0}, {guestHints, 0}, {guestWrites, 0},
		{beginsEpoch, 0}, {announces, 0}, {guestSees, 0}, {hintsTake, 0}, {hintsTake, 0}, {hintsApply, 0}}},

	{"written between the announcement and the CLEAR", policyHasty, oneChunk, false, 0, schedule{
		{beginsEpoch, 0}, {guestSees, 0}, {guestHints, 0}, {guestWrites, 0}, {hintsTake, 0}, {hintsTake, 0},
		{goesOn, 0}, {goesOn, 0}, {goesOn, 0}, {goesOn, 0}, {goesOn, 0}, {goesOn, 0}, {hintsApply, 0}}},

	{"a hint in hand while the next epoch begins", policyAnyID, oneChunk, false, 3, schedule{
		{beginsEpoch, 0}, {announces, 0}, {guestSees, 0}, {guestHints, 3}, {hintsTake, 0}, {endsHints, 0}, {guestSees, 0},
		{hintsTake, 0}, {guestWrites, 3}, {hintsTake, 0}, {beginsEpoch, 0},
		{goesOn, 0}, {goesOn, 0}, {goesOn, 0}, {goesOn, 0}, {goesOn, 0}, {goesOn, 0}, {hintsApply, 0}}},
}

// Every kept schedule still shows what is wrong with its policy. The same moves lose
// nothing under the real one.
func TestKeptSchedules(t *testing.T) {
	for _, k := range kept {
		t.Run(k.name, func(t *testing.T) {
			told, got, err := tellSchedule(k.layout, k.policy, k.schedule)
			must(t, err)
			t.Logf("\n%s", told)
			pages := got.ruined
			if k.undone {
				pages = got.undone
			}
			if !slices.Contains(pages, k.page) {
				t.Errorf("place %d is not among those that the schedule is about: %+v", k.page, got)
			}
			for _, l := range append([]layout{k.layout}, layouts...) {
				told, got, err := tellSchedule(l, policyEpoch, k.schedule)
				must(t, err)
				if got.any() {
					t.Errorf("under hint epochs:\n%s", told)
				}
			}
		})
	}
}
