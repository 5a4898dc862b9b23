package migrate

import (
	"context"
	"fmt"
	"time"

	"github.com/govmm/govmm/mempage"
)

// Estimate is what a migration is expected to take, foretold from what the
// guest writes and what the way to the destination carries. Nothing is moved.
type Estimate struct {
	// Converges says that the rounds shrink until the downtime limit can be
	// kept; if not, Rounds and Total are up to where that was clear.
	Converges bool          `json:"converges"`
	Note      string        `json:"note,omitempty"` // why not
	Rounds    int           `json:"rounds"`         // in which the guest runs
	Total     time.Duration `json:"total_ms"`
	Downtime  time.Duration `json:"downtime_ms"`
	// BandwidthBytes a second were measured, RTT is a round trip.
	BandwidthBytes uint64        `json:"bandwidth_bytes"`
	RTT            time.Duration `json:"rtt_ms"`
	// RAMBytes is all of the guest's memory, DataBytes what of it has content
	// other than zeros.
	RAMBytes  uint64    `json:"ram_bytes"`
	DataBytes uint64    `json:"data_bytes"`
	DirtyRate DirtyRate `json:"dirty_rate"`
}

// EstimateMigration predicts what a migration of src to the [Receiver] at address
// would take under opt: it counts what there is to send, watches for an interval
// what the guest writes, and sends the receiver bytes that it throws away. The
// dirty log of src must not be in use.
func EstimateMigration(ctx context.Context, src Source, address string, opt Options, interval time.Duration) (Estimate, error) {
	if err := opt.Validate(); err != nil {
		return Estimate{}, err
	}
	opt = opt.withDefaults()
	// The link first: it needs no guest, and it may refuse.
	link, err := probeLinks(ctx, newDialer(address, opt), opt.Channels)
	if err != nil {
		return Estimate{}, err
	}
	began := time.Now()
	data, _, err := populatedPages(ctx, src)
	if err != nil {
		return Estimate{}, err
	}
	looking := time.Since(began)
	rate, err := MeasureDirtyRate(ctx, src, src, interval)
	if err != nil {
		return Estimate{}, err
	}
	return predict(prediction{link: link, rate: rate, data: data, looking: looking}, opt), nil
}

// prediction is what an estimate is made from.
type prediction struct {
	link    linkSpeed
	rate    DirtyRate
	data    uint64        // pages with content
	looking time.Duration // to look at all memory
}

// setupTime is what it takes to build a machine, about.
const setupTime = 20 * time.Millisecond

// predict plays the rounds of [precopy] through, with the same rules.
func predict(in prediction, opt Options) Estimate {
	e := Estimate{BandwidthBytes: uint64(in.link.bandwidth), RTT: in.link.rtt,
		RAMBytes: in.rate.RAMBytes, DataBytes: in.data * mempage.Size, DirtyRate: in.rate}
	full := max(in.link.bandwidth, 1)
	rounds := full
	if opt.BandwidthLimit > 0 {
		rounds = min(full, float64(opt.BandwidthLimit))
	}
	est := newEstimator(in.link.rtt)
	total := setupTime + in.link.rtt
	for left := in.data; ; {
		took := seconds(float64(left*mempage.Size)/rounds) + in.link.rtt
		if e.Rounds == 0 {
			took += in.looking
		}
		total += took
		e.Rounds++
		est.round(uint64(rounds*took.Seconds()), took)
		before := left
		left = in.rate.dirtied(took)
		if est.downtime(left) <= opt.DowntimeLimit {
			e.Converges = true
			// What is sent while the guest stands still is not throttled.
			last := newEstimator(in.link.rtt)
			last.round(uint64(full), time.Second)
			stop := last.downtime(left)
			e.Downtime = stop
			total += stop
			break
		}
		if opt.MaxRounds > 0 && e.Rounds >= opt.MaxRounds || total >= opt.Timeout || e.Rounds > 1 && left >= before-before/100 {
			e.Downtime = est.downtime(left)
			e.Note = fmt.Sprintf("the guest writes %d MiB in the time of a round, and the downtime would be %v where %v are allowed",
				left*mempage.Size>>20, est.downtime(left).Round(time.Millisecond), opt.DowntimeLimit)
			break
		}
	}
	e.Total = total
	return e
}

// seconds is a bounded duration.
func seconds(s float64) time.Duration {
	return time.Duration(min(s, forever.Seconds()) * float64(time.Second))
}
