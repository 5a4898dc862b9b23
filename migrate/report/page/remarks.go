package page

import (
	"fmt"
	"time"

	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/migrate/report"
)

// Remarks says in a sentence each what limited a migration, and what would have made it
// faster.
func Remarks(r *report.Result) (list []string) {
	say := func(format string, args ...any) { list = append(list, fmt.Sprintf(format, args...)) }
	if r.Error != "" {
		say("It ended with: %s.", r.Error)
	}
	link, written := pace(r)
	switch {
	case link == 0:
	case written > link:
		say("The guest wrote %s a second to its memory and the link carried %s: rounds do not shrink then, and --auto-converge, or postcopy (--postcopy), ends such a migration.",
			units.Bytes(written), units.Bytes(link))
	case len(r.Rounds) > 10:
		say("It took %d rounds, since the guest wrote %s a second, and the link carried %s: a faster link, or more channels (--channels), would have needed fewer.",
			len(r.Rounds), units.Bytes(written), units.Bytes(link))
	default:
		say("The link carried %s a second: nearly all of the time went into sending.", units.Bytes(link))
	}
	if link > 0 && link < 400<<20 && r.Compression == "none" && r.PagesSent > 4096 {
		say("On a link of this speed --compress zstd or lz4 may pay, if processors are free.")
	}
	if r.Setup > r.Total/2 && r.DiskBytes == 0 && r.Total > 0 {
		say("More than half of the time was set-up: the destination built the machine for %s.", milliseconds(r.Setup))
	}
	if r.DiskBytes > 0 {
		say("Its disks were copied first: %s of %s had content. Storage that both hosts reach would need none of it.", units.Bytes(r.DiskBytesSent), units.Bytes(r.DiskBytes))
	}
	if r.ThrottlePercent > 0 {
		say("The guest was slowed down by up to %d%%, since rounds did not shrink.", r.ThrottlePercent)
	}
	remarkHints(r, say)
	remarkStop(r, say)
	if p := r.Postcopy; p != nil {
		say("The guest moved with %s of its memory missing, which had all arrived after %s; it waited for %d pages, half of them for less than %s, and for %s at most.",
			units.Bytes(p.Pages*pageSize), milliseconds(p.Duration), p.Faults, milliseconds(p.P50), milliseconds(p.Longest))
	}
	return list
}

func remarkHints(r *report.Result, say func(string, ...any)) {
	switch {
	case r.PagesHinted > 0:
		say("The guest said of %s that it was free, and that was not sent.", units.Bytes(r.PagesHinted*pageSize))
	case r.HintsOff != "" && r.PagesSent > 4096:
		say("The guest was not asked for its free memory: %s.", r.HintsOff)
	}
	if r.HintWait > r.Total/10 && r.HintWait > 0 {
		say("For %s nothing was sent, to wait for the guest's answer about free memory; --hint-wait bounds that.", milliseconds(r.HintWait))
	}
}

// remarkStop is about the stop.
func remarkStop(r *report.Result, say func(string, ...any)) {
	if r.Downtime == 0 {
		return
	}
	largest := part{}
	for _, p := range downtimeParts(r.DowntimeParts) {
		if p.took > largest.took {
			largest = p
		}
	}
	advice := map[string]string{
		"pause":   "vCPUs and devices had to get quiet first; a device that waits for slow storage holds them up",
		"pages":   "the last pages; a lower --downtime-limit makes another round of more of them",
		"storage": "blocks of the disks were compared at both hosts",
		"yield":   "what was left in the disks' caches was written",
		"load":    "the destination loaded the state of the devices and vCPUs",
		"resume":  "the destination took its disks and let the vCPUs run",
		"wire":    "bytes under way, and two round trips",
	}
	text := fmt.Sprintf("The largest part of the downtime was %s, %s of %s", largest.name, milliseconds(largest.took), milliseconds(r.Downtime))
	if a := advice[largest.name]; a != "" {
		text += ": " + a
	}
	say("%s.", text)
	if r.DowntimeNote != "" {
		say("The downtime limit was exceeded: %s.", r.DowntimeNote)
	}
	if r.StopsUndone > 0 {
		say("%d earlier stops were undone, the last one since %s.", r.StopsUndone, r.UndoneNote)
	}
}

// pace is what the link carried a second, and what the guest wrote a second while rounds
// went on.
func pace(r *report.Result) (link, written uint64) {
	var bytes, pages uint64
	var d time.Duration
	for i, x := range r.Rounds {
		bytes += x.BytesSent
		d += x.Duration
		if i > 0 {
			pages += x.DirtyPages
		}
	}
	return perSecond(bytes, d), perSecond(pages*pageSize, d)
}
