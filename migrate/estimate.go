package migrate

import (
	"context"
	"fmt"
	"time"

	"github.com/govmm/govmm/mempage"
)

// EstimateMigration predicts what a migration to the [Receiver] at address would
// take: it counts what there is to send, watches for an interval what the guest
// writes, and sends bytes that the receiver throws away. The dirty log must be off.
func EstimateMigration(ctx context.Context, src Source, address string, opt Options, interval time.Duration) (Estimate, error) {
	if err := opt.Validate(); err != nil {
		return Estimate{}, err
	}
	opt = opt.withDefaults()
	// The link first: it costs the guest nothing, and the receiver may refuse.
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

// prediction is the input of [predict].
type prediction struct {
	link    linkSpeed
	rate    DirtyRate
	data    uint64        // pages with content
	looking time.Duration // what it takes to look at all memory
}

// setupTime is about what it takes to build a machine.
const setupTime = 20 * time.Millisecond

// predict simulates the rounds of [precopy], by the same rules.
func predict(in prediction, opt Options) Estimate {
	e := Estimate{BandwidthBytes: uint64(in.link.bandwidth), RTT: in.link.rtt,
		RAMBytes: in.rate.RAMBytes, DataBytes: in.data * mempage.Size, DirtyRate: in.rate}
	full := max(in.link.bandwidth, 1)
	rounds := full
	if opt.BandwidthLimit > 0 {
		rounds = min(full, float64(opt.BandwidthLimit))
	}
	est := newDowntimeModel(in.link.rtt)
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
		left = dirtied(in.rate, took)
		if est.downtime(left) <= opt.DowntimeLimit {
			e.Converges = true
			// The bandwidth limit does not apply to the stop.
			last := newDowntimeModel(in.link.rtt)
			last.round(uint64(full), time.Second)
			stop := last.downtime(left)
			e.Downtime = stop
			total += stop
			break
		}
		if opt.MaxRounds > 0 && e.Rounds >= opt.MaxRounds || total >= opt.Timeout || e.Rounds > 1 && left >= before-before/100 {
			e.Downtime = est.downtime(left)
			e.Note = fmt.Sprintf("the guest writes %d MiB during a round, and the downtime would be %v with a limit of %v",
				left*mempage.Size>>20, est.downtime(left).Round(time.Millisecond), opt.DowntimeLimit)
			break
		}
	}
	e.Total = total
	return e
}

// seconds is a duration of at most forever.
func seconds(s float64) time.Duration {
	return time.Duration(min(s, forever.Seconds()) * float64(time.Second))
}
