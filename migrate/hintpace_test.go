package migrate

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
	"pgregory.net/rapid"
)

// hintSim is a first round in simulated time: a guest that names its free pages by a
// script, a link, and a sender that does what hintPace says.
type hintSim struct {
	words []simWord
	said  []saying // by time

	rate  float64                        // pages a second of the link
	ramp  func(at time.Duration) float64 // if set, the share of rate that the link carries then
	lanes int
	wait  time.Duration // --hint-wait
	limit bool          // the rate is one that the user set
	short bool          // of processors
}

// simWord is 64 pages of a simulated guest, all alike.
type simWord uint8

const (
	simUsed simWord = iota
	simFree         // and it has content
	simZero         // free, and zero
	simGone         // sent, or taken out by a hint
)

// saying is what the guest says at a time: it begins, names pages, ends.
type saying struct {
	at         time.Duration
	start, end bool
	first, n   int // words
}

// simResult is how long a round took, what hints spared, and the time that was waited.
type simResult struct {
	took, waited time.Duration
	spared, sent int
	dismissed    bool // it was too slow for the link, and told to stop
}

func (r simResult) String() string {
	return fmt.Sprintf("%v (waited %v), %d pages sent, %d spared", r.took.Round(time.Millisecond), r.waited.Round(time.Millisecond), r.sent, r.spared)
}

// run plays the round in a mode.
func (s hintSim) run(mode HintMode) (r simResult) {
	words := append([]simWord(nil), s.words...)
	var inWay, named int // pages with content: taken out, named
	var answering, ended bool
	var began time.Duration
	said := s.said
	hear := func(now time.Duration) {
		for ; len(said) > 0 && said[0].at <= now && mode != HintsOff; said = said[1:] {
			switch x := said[0]; {
			case x.start:
				answering, began = true, max(1, x.at)
			case x.end:
				answering, ended = false, true
			default:
				for i := x.first; i < x.first+x.n; i++ {
					if s.words[i] == simFree {
						named += mempage.WordBits
					}
					if words[i] == simFree {
						inWay += mempage.WordBits
					}
					words[i] = simGone
				}
			}
		}
	}
	next := func(now time.Duration) time.Duration { // when something is said, or a tick has passed
		if len(said) > 0 && (said[0].start || said[0].end) {
			return min(said[0].at, now+hintTick)
		}
		return now + hintTick
	}
	var now time.Duration
	if mode == HintsOn {
		for !ended && now < s.wait && (answering || now < s.wait/4) {
			now = min(next(now), s.wait)
			hear(now)
		}
		r.waited = now
	}
	p := hintPace{most: s.wait, lanes: s.lanes, short: s.short}
	if s.limit {
		p.limit = s.rate
	}
	free := make([]time.Duration, s.lanes) // when each connection can take a span
	for lane := range free {
		free[lane] = now
	}
	l := simLink{rate: s.rate, ramp: s.ramp, at: now, seen: now}
	for cursor := 0; ; {
		lane := 0
		for i, at := range free {
			if at < free[lane] {
				lane = i
			}
		}
		now = max(now, free[lane])
		hear(now)
		most := uint64(maxSpan)
		for mode == HintsAuto && !ended {
			p.sent = uint64(r.sent)
			landed, busy := l.carried(now)
			p.link.add(busy, landed)
			p.note(began, now, float64(named), float64(inWay))
			left := 0
			for _, w := range words {
				if w != simGone {
					left += mempage.WordBits
				}
			}
			if p.hopeless(uint64(left)) {
				r.dismissed, ended, said = true, true, nil
				break
			}
			if most = p.span(); !p.waits() {
				break
			}
			was := now
			now = next(now)
			p.waited += now - was
			hear(now)
		}
		for cursor < len(words) && words[cursor] == simGone {
			cursor++
		}
		if cursor == len(words) {
			break
		}
		n := 0
		step := int(most / mempage.WordBits)
		for end := cursor + step - cursor%step; cursor < min(end, len(words)); cursor++ {
			if words[cursor] == simUsed || words[cursor] == simFree {
				n += mempage.WordBits
			}
			words[cursor] = simGone
		}
		r.sent += n
		free[lane] = l.carry(now, n)
	}
	r.took = max(now, l.at)
	if mode == HintsAuto {
		r.waited = p.waited
	}
	r.spared = inWay
	return r
}

// simGuest is how a simulated guest lies in memory and answers.
type simGuest struct {
	used     float64 // share of the blocks of 4 MiB; 0: a tenth
	lies     string  // where these lie: "" at the start, or "apart", or "end"
	zero     float64 // share of the free blocks that are zero
	order    string  // of the free blocks that it names: "up", "down" or "mixed"
	rate     float64 // pages a second that it names
	late     time.Duration
	burst    int           // blocks that it names at once; 0: 1
	stops    float64       // after this share of its free blocks it says no more; 0: it says all, and STOP
	overtime time.Duration // from the last page to STOP
}

// simLink carries spans one after another.
type simLink struct {
	rate       float64                     // pages a second
	ramp       func(time.Duration) float64 // if set, the share of rate that it carries at a time
	at         time.Duration               // when all has landed
	way        []simSpan
	landed     float64
	busy, seen time.Duration
}

// simSpan is a span on the way.
type simSpan struct {
	from, to time.Duration
	pages    float64
}

// carry returns when n more pages will have landed.
func (l *simLink) carry(now time.Duration, n int) time.Duration {
	const step = time.Millisecond
	from := max(now, l.at)
	l.at = from
	left := float64(n)
	for l.ramp != nil && l.ramp(l.at) < 1 && left > l.rate*l.ramp(l.at)*step.Seconds() {
		left -= l.rate * l.ramp(l.at) * step.Seconds()
		l.at += step
	}
	rate := l.rate
	if l.ramp != nil {
		rate *= l.ramp(l.at)
	}
	l.at += time.Duration(left / rate * float64(time.Second))
	if n > 0 {
		l.way = append(l.way, simSpan{from, l.at, float64(n)})
	}
	return l.at
}

// carried is what precopy.carried measures.
func (l *simLink) carried(now time.Duration) (landed float64, busy time.Duration) {
	for len(l.way) > 0 && l.way[0].to <= now {
		x := l.way[0]
		l.landed, l.busy, l.way = l.landed+x.pages, l.busy+x.to-x.from, l.way[1:]
	}
	landed, busy = l.landed, l.busy
	if len(l.way) > 0 {
		x := l.way[0]
		busy += now - x.from
		landed += x.pages * float64(now-x.from) / float64(x.to-x.from) // the kernel's queue tells
	}
	return landed, busy
}

const (
	simMB     = 1e6 / mempage.Size      // pages in a megabyte
	simBlock  = 1024 / mempage.WordBits // words in 4 MiB
	simBlocks = 256                     // 1 GiB
	simPages  = simBlocks * 1024
)

func (g simGuest) sim() hintSim {
	random := rand.New(rand.NewPCG(1, 2))
	s := hintSim{words: make([]simWord, simBlocks*simBlock), said: []saying{{at: g.late, start: true}}}
	used := int(simBlocks * cmp.Or(g.used, 0.1))
	order := make([]int, simBlocks)
	for b := range order {
		order[b] = b
	}
	switch g.lies {
	case "apart":
		random.Shuffle(len(order), func(i, k int) { order[i], order[k] = order[k], order[i] })
	case "end":
		slices.Reverse(order)
	}
	order = order[used:]
	for _, b := range order {
		kind := simFree
		if random.Float64() < g.zero {
			kind = simZero
		}
		for i := range simBlock {
			s.words[b*simBlock+i] = kind
		}
	}
	slices.Sort(order)
	switch g.order {
	case "down":
		slices.Reverse(order)
	case "mixed":
		random.Shuffle(len(order), func(i, k int) { order[i], order[k] = order[k], order[i] })
	}
	at, burst := g.late, max(1, g.burst)
	for i, b := range order {
		if g.stops > 0 && float64(i) >= g.stops*float64(len(order)) {
			return s
		}
		if i%burst == 0 {
			at += time.Duration(float64(burst*1024) / g.rate * float64(time.Second))
		}
		s.said = append(s.said, saying{at: at, first: b * simBlock, n: simBlock})
	}
	s.said = append(s.said, saying{at: at + g.overtime, end: true})
	return s
}

// simLinks are the links that rounds are played over.
func simLinks(s hintSim, each func(what string, s hintSim)) {
	s.wait = time.Second
	for _, mb := range []float64{20, 100, 500, 3000} {
		for _, s.lanes = range []int{1, 2, 16} {
			s.rate = mb * simMB
			s.limit, s.ramp, s.short = false, nil, s.lanes < 16
			each(fmt.Sprintf("%v MB/s by %d connections", mb, s.lanes), s)
			s.limit = true
			each(fmt.Sprintf("%v MB/s by %d connections, which the user set", mb, s.lanes), s)
			s.limit = false
			s.ramp = func(at time.Duration) float64 { return min(1, 0.01+float64(at)/float64(200*time.Millisecond)) }
			each(fmt.Sprintf("up to %v MB/s by %d connections after 200 ms", mb, s.lanes), s)
		}
	}
}

// noSlower plays a round in all modes. In mode auto it takes at most 1.05 of the better of
// on and off.
func (s hintSim) noSlower(t interface{ Errorf(string, ...any) }, what string) (on, off, auto simResult) {
	on, off, auto = s.run(HintsOn), s.run(HintsOff), s.run(HintsAuto)
	better := min(on.took, off.took)
	if auto.dismissed { // it might have become many times faster
		better = off.took
	}
	if auto.took > better*105/100+hintTick || auto.waited > s.wait+hintTick {
		t.Errorf("%s is slower:\nauto %v\non   %v\noff  %v", what, auto, on, off)
	}
	return on, off, auto
}

// Whatever the guest's pace and the link's, auto is as fast as the better of on and off;
// and where the guest is the faster one, it spares 90% of what on spares.
func TestHintPace(t *testing.T) {
	for name, g := range map[string]simGuest{
		"ascending":             {order: "up"},
		"descending":            {order: "down"},
		"mixed":                 {order: "mixed", lies: "apart"},
		"in use at the end":     {order: "up", lies: "end"},
		"half of it in use":     {order: "mixed", lies: "apart", used: 0.5},
		"most of it in use":     {order: "down", used: 0.9},
		"zero":                  {order: "mixed", zero: 0.9},
		"late":                  {order: "up", late: 60 * time.Millisecond},
		"at the last moment":    {order: "mixed", late: 900 * time.Millisecond},
		"after the last moment": {order: "mixed", late: 1100 * time.Millisecond},
		"in bursts":             {order: "mixed", burst: 16},
		"in two bursts":         {order: "mixed", burst: 128},
		"stops halfway":         {order: "mixed", stops: 0.5},
		"stops soon":            {order: "up", stops: 0.05},
		"names what was sent":   {order: "up", late: 200 * time.Millisecond, stops: 0.5},
		"never says STOP":       {order: "down", overtime: time.Hour},
		"says START alone":      {order: "up", stops: 1e-9},
		"never answers":         {order: "up", late: time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			for _, mb := range []float64{30, 185, 1000, 10000} {
				g.rate = mb * simMB
				simLinks(g.sim(), func(what string, s hintSim) {
					what = fmt.Sprintf("a guest that names %v MB/s, %s", mb, what)
					on, off, auto := s.noSlower(t, what)
					late := len(s.said) < 2 || s.said[1].at.Seconds()*s.rate > simPages/20 // much was sent before
					if g.burst == 0 && 2*g.rate < s.rate && auto.waited > hintTick {
						t.Errorf("%s waits although the link is faster:\nauto %v", what, auto)
					}
					few := on.spared < simPages/20
					if g.rate*(1-g.zero) > s.rate && s.ramp == nil && !late && !few && auto.spared*10 < on.spared*9 {
						t.Errorf("%s spares less:\nauto %v\non   %v\noff  %v", what, auto, on, off)
					}
				})
			}
		})
	}
}

// A guest may name its pages in any order at any times.
func TestHintPaceOfAnyGuest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g := simGuest{
			used:  rapid.Float64Range(0.02, 0.95).Draw(t, "used"),
			lies:  rapid.SampledFrom([]string{"", "apart", "end"}).Draw(t, "lies"),
			zero:  rapid.SampledFrom([]float64{0, 0.3, 1}).Draw(t, "zero"),
			order: rapid.SampledFrom([]string{"up", "down", "mixed"}).Draw(t, "order"),
			rate:  1e9,
		}
		s := g.sim()
		at := time.Duration(0)
		for i := range s.said {
			at += time.Duration(rapid.OneOf(rapid.Just(0), rapid.IntRange(0, 20000), rapid.IntRange(0, 500000)).Draw(t, "µs")) * time.Microsecond
			s.said[i].at = at
		}
		s.said = s.said[:rapid.IntRange(0, len(s.said)).Draw(t, "said")]
		s.rate = rapid.Float64Range(1, 5000).Draw(t, "MB/s") * simMB
		s.lanes = rapid.IntRange(1, MaxChannels).Draw(t, "channels")
		s.limit = rapid.Bool().Draw(t, "limit")
		s.short = rapid.Bool().Draw(t, "short")
		s.wait = time.Duration(rapid.IntRange(0, 5000).Draw(t, "wait, ms")) * time.Millisecond
		s.noSlower(t, "auto")
	})
}

// A guest that shows nothing in time is told to stop, over a link that is fast, where
// processors are short. It is left alone where one of that is not so.
func TestHintTrial(t *testing.T) {
	for _, x := range []struct {
		what      string
		mb        float64
		guest     simGuest
		spare     bool
		dismissed bool
	}{
		{"slow to begin", 3000, simGuest{order: "down", rate: 400 * simMB, late: 15 * time.Millisecond}, false, true},
		{"slow", 3000, simGuest{order: "down", rate: 400 * simMB}, false, true},
		{"fast", 3000, simGuest{order: "down", rate: 10000 * simMB}, false, false},
		{"slow to begin, processors to spare", 3000, simGuest{order: "down", rate: 400 * simMB, late: 15 * time.Millisecond}, true, false},
		{"slow to begin, a slow link", 300, simGuest{order: "down", rate: 400 * simMB, late: 15 * time.Millisecond}, false, false},
	} {
		s := x.guest.sim()
		s.rate, s.lanes, s.wait, s.short = x.mb*simMB, 2, time.Second, !x.spare
		if r := s.run(HintsAuto); r.dismissed != x.dismissed {
			t.Errorf("%s: dismissed %v, expected %v: %v", x.what, r.dismissed, x.dismissed, r)
		}
		// What a token bucket or a buffer on the way takes at once does not make a link fast.
		s.rate, s.ramp = 3000*simMB, func(at time.Duration) float64 {
			if at < 2*time.Millisecond {
				return 1
			}
			return 0.03
		}
		if r := s.run(HintsAuto); r.dismissed {
			t.Errorf("%s: dismissed over a link that is fast for 2 ms only: %v", x.what, r)
		}
	}
}
