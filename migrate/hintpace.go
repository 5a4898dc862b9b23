package migrate

import (
	"time"

	"github.com/govmm/govmm/mempage"
)

// hintPace decides, in mode auto, whether the first round sends or waits while the guest
// names free pages. It has no clock of its own: the simulation in its test brings one.
//
// Let the guest name h pages a second that the link would have to carry, and the link
// carry b. A second of waiting takes h pages out, which saves h/b seconds: waiting wins
// while h is above b. Where it does not, the round sends on, and hints take out what it
// has not come to. Three bounds hold whatever the guest does, and whatever was measured:
//
//   - The time that was waited is at most the link's time for what hints have taken out.
//     So the round takes no longer than without hints.
//   - It waits only when mode on would: so long after the announcement, for a guest that
//     began to answer in time. So the round takes no longer than in mode on, in which
//     nothing is sent in the time in which it sends.
//   - While waiting wins, one page is sent for every [hintSparing] that were taken out. So
//     what is sent before the guest comes to name it is a small share, wherever it lies;
//     and the link is measured on.
type hintPace struct {
	limit float64       // pages a second that the user allows; 0: no limit
	most  time.Duration // to wait
	lanes int           // connections
	// short says that this host has hardly more processors than connections.
	short bool

	link   growth // content pages that have landed, over the time in which some were on their way
	answer growth // content pages that the guest has named, since its answer began

	sent   uint64        // pages with content
	taken  float64       // that hints took out: they were named before they were sent
	began  time.Duration // from the announcement to the begin of the answer; 0: not yet
	asked  time.Duration // since the announcement
	waited time.Duration // while nothing was sent
}

const (
	// hintSparing: of the pages that hints could spare one in so many may be sent while
	// waiting wins.
	hintSparing = 16
	// hintSlice is how much of the link's time the spans of all connections take
	// together while hints come. What is on its way cannot be spared.
	hintSlice = 20 * time.Millisecond
	// hintBusy is the pages a second from which on a link may be bound by the processor.
	hintBusy = 400 << 20 / mempage.Size
	// linkPages must have landed before the link's pace counts, and fastPages before it
	// counts as fast: what buffers and token buckets on the way take at once is less.
	linkPages = significantBytes / mempage.Size
	fastPages = 8 << 20 / mempage.Size
	// hintTrial is how long a guest may take to show its pace over a link that is fast,
	// or hintTrialShare of the round if that is longer.
	hintTrial      = 5 * time.Millisecond
	hintTrialShare = 32
)

// linkRate is the pages a second that the link carries; 0: not known yet. A rate that
// still rises is not known: so it is while TCP finds out what the link can do.
func (p *hintPace) linkRate() float64 {
	var rate float64
	if p.link.last.pages >= linkPages && !p.link.rising {
		rate = p.link.rate()
	}
	if p.limit > 0 && (rate == 0 || p.limit < rate) {
		return p.limit
	}
	return rate
}

// note records how far the answer has come: how many pages with content were named, and
// taken out, at a time after the announcement. began is when it began; 0: it has not.
func (p *hintPace) note(began, asked time.Duration, named, taken float64) {
	p.began, p.asked, p.taken = began, asked, taken
	if began > 0 {
		p.answer.add(asked-began, named)
	}
}

// waits reports whether to wait now. The guest has not ended its answer.
func (p *hintPace) waits() bool {
	b := p.linkRate()
	if p.began == 0 || p.began > p.most/4 || p.asked > p.most || b == 0 || p.answer.rate() <= b {
		return false
	}
	return p.waited.Seconds() < p.taken/b && float64(p.sent)*hintSparing > p.taken
}

// hopeless reports whether to end the answer, with so many pages left to send: the guest is
// far slower than a link that the processor may bound, or has named nothing yet, and takes
// processor time from those that send. A link that still rises is at least so fast.
func (p *hintPace) hopeless(left uint64) bool {
	b := p.link.rate()
	if p.limit > 0 {
		b = min(b, p.limit)
	}
	if !p.short || p.link.last.pages < fastPages || b < hintBusy || p.answer.rate()*2 > b {
		return false
	}
	round := float64(p.sent+left) / b
	return p.asked.Seconds() > max(round/hintTrialShare, hintTrial.Seconds())
}

// span is how many pages a worker may pick at once: a power of two, and a multiple of 64.
func (p *hintPace) span() uint64 {
	n := uint64(p.linkRate() * hintSlice.Seconds() / float64(p.lanes))
	for n = min(maxSpan, n); n&(n-1) != 0; n &= n - 1 {
	}
	return max(mempage.WordBits, n)
}

// growth is a count that grows with time, and its rate over at least the latter half of that
// time: long enough for what comes in bursts, and short enough to see that no more comes.
type growth struct {
	older, newer, last mark
	rising             bool // by a quarter from one half to the next
	halves             int
}

// mark is a count at a time.
type mark struct {
	at    time.Duration
	pages float64
}

func (m mark) rateSince(o mark) float64 {
	return (m.pages - o.pages) / max(m.at-o.at, paceStep/4).Seconds()
}

// paceStep is the first half.
const paceStep = 2 * time.Millisecond

// add records the count at a time.
func (p *growth) add(at time.Duration, pages float64) {
	p.last = mark{max(at, p.last.at), max(pages, p.last.pages)}
	if at < 2*p.newer.at+paceStep {
		return
	}
	p.rising = p.halves == 0 || p.last.rateSince(p.newer) > 1.25*p.newer.rateSince(p.older)
	p.halves++
	p.older, p.newer = p.newer, p.last
}

func (p *growth) rate() float64 { return p.last.rateSince(p.older) }
