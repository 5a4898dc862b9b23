package vmm

import (
	"context"
	"iter"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/migrate"
)

// EventType says what has happened.
type EventType string

// The types of events. A later version may have more of them.
const (
	EventState       EventType = "state"        // the VM's state has changed: State, Was
	EventPanic       EventType = "panic"        // the guest's kernel has reported that it panicked
	EventReset       EventType = "reset"        // the guest has reset itself, and starts again
	EventDiskError   EventType = "disk-error"   // storage failed a request of the guest: Device, Message
	EventDeviceError EventType = "device-error" // a device needs a reset by its driver: Device, Message
	EventMigration   EventType = "migration"    // a migration from here is in another phase: Migration, Address, Phase; at its end Reason and Message
	EventRound       EventType = "round"        // a round of it has ended: Migration, Round
	EventRefused     EventType = "refused"      // a receiver has refused a source, or a migration to it failed: Address, Message
	EventLost        EventType = "lost"         // events that are not kept any more: Lost of them, up to this one's number
)

// Event is something that has happened to a VM. Fields that a type does not name are empty.
type Event struct {
	// Seq counts the events of this process, from 1. An event with Lost has the number of the last that is lost.
	Seq       uint64              `json:"seq"`
	Time      time.Time           `json:"time"`
	Type      EventType           `json:"type"`
	State     State               `json:"state,omitempty"`
	Was       State               `json:"was,omitempty"`
	Device    string              `json:"device,omitempty"`
	Migration string              `json:"migration,omitempty"` // its id
	Address   string              `json:"address,omitempty"`
	Phase     migrate.Phase       `json:"phase,omitempty"`
	Reason    migrate.Reason      `json:"reason,omitempty"`
	Round     *migrate.RoundStats `json:"round,omitempty"`
	Message   string              `json:"message,omitempty"`
	More      int                 `json:"more,omitempty"` // events like this one, since the last that was noted
	Lost      uint64              `json:"lost,omitempty"`
}

const (
	// maxEvents is how many events are kept.
	maxEvents = 256
	// eventPace is the least time between two events of a type and device that a guest or a
	// peer can cause as often as it likes.
	eventPace = 100 * time.Millisecond
	// maxPaced bounds the types and devices that are told apart for that.
	maxPaced = 64
	// maxEventText bounds a text of an event, in bytes.
	maxEventText = 512
)

// events are the last events of a VM. Who reads them has no place of its own here, and is
// waited for by nobody.
type events struct {
	eventMu sync.Mutex // guards all below; no other lock is taken while it is held
	ring    []Event    // the event with the number n is at (n-1) % maxEvents
	last    uint64     // number of the last event
	state   State      // of the last event of that type
	paced   map[pacedKey]*pacing
	more    chan struct{} // closed at the next event, or at the end; nil: nobody waits
	stop    chan struct{} // closed when the stop of a migration is over; nil: there is none
	ended   bool
}

type pacedKey struct {
	typ    EventType
	device string
}

type pacing struct {
	at      time.Time // of the last event
	skipped int
}

// add notes an event.
func (l *events) add(e Event) {
	l.eventMu.Lock()
	defer l.eventMu.Unlock()
	l.addLocked(e)
}

// addLocked needs eventMu.
func (l *events) addLocked(e Event) {
	if l.ended {
		return
	}
	l.last++
	e.Seq, e.Time = l.last, time.Now()
	for _, text := range []*string{&e.Message, &e.Device, &e.Address} {
		*text = eventText(*text)
	}
	if len(l.ring) < maxEvents {
		l.ring = append(l.ring, e)
	} else {
		l.ring[(e.Seq-1)%maxEvents] = e
	}
	l.wake()
}

// addPaced notes an event that a guest or a peer may cause often.
func (l *events) addPaced(e Event) (added bool) {
	l.eventMu.Lock()
	defer l.eventMu.Unlock()
	key := pacedKey{e.Type, e.Device}
	p := l.paced[key]
	if p == nil {
		if len(l.paced) >= maxPaced {
			key = pacedKey{}
		}
		if l.paced == nil {
			l.paced = map[pacedKey]*pacing{}
		}
		if p = l.paced[key]; p == nil {
			p = &pacing{}
			l.paced[key] = p
		}
	}
	now := time.Now()
	if now.Sub(p.at) < eventPace {
		p.skipped++
		return false
	}
	e.More = p.skipped
	*p = pacing{at: now}
	l.addLocked(e)
	return true
}

// note notes the state if it is another than the last one.
func (l *events) note(s State) {
	l.eventMu.Lock()
	defer l.eventMu.Unlock()
	if s != l.state {
		l.addLocked(Event{Type: EventState, State: s, Was: l.state})
		l.state = s
	}
}

// end is called when nothing more can happen.
func (l *events) end() {
	l.eventMu.Lock()
	defer l.eventMu.Unlock()
	l.ended = true
	l.wake()
}

// wake needs eventMu.
func (l *events) wake() {
	if l.more != nil {
		close(l.more)
		l.more = nil
	}
}

// next returns the event after a number, or what to wait for; nil: there will be none.
func (l *events) next(after uint64) (e Event, ok bool, more <-chan struct{}) {
	l.eventMu.Lock()
	defer l.eventMu.Unlock()
	switch first := l.last - uint64(len(l.ring)) + 1; {
	case after+1 < first:
		return Event{Seq: first - 1, Time: time.Now(), Type: EventLost, Lost: first - 1 - after}, true, nil
	case after < l.last:
		return l.ring[after%maxEvents], true, nil
	case l.ended:
		return Event{}, false, nil
	}
	if l.more == nil {
		l.more = make(chan struct{})
	}
	return Event{}, false, l.more
}

// Events returns the events of the VM whose numbers are greater than after, in order: those
// that are kept, and, with follow, those that come until ctx or the VM ends. The last 256 are
// kept; where some are missing, one of type [EventLost] stands for them. Who takes its time
// keeps nobody waiting. An after that no event has had yet matches [ErrInvalid].
func (v *VM) Events(ctx context.Context, after uint64, follow bool) (iter.Seq[Event], error) {
	v.events.eventMu.Lock()
	last := v.events.last
	v.events.eventMu.Unlock()
	if after > last {
		return nil, kind.Invalid("events after %d: the last one is %d; the numbers begin anew in each process of a VM", after, last)
	}
	return func(yield func(Event) bool) {
		for at := after; ctx.Err() == nil; {
			e, ok, more := v.events.next(at)
			switch {
			case ok:
				if at = e.Seq; !yield(e) {
					return
				}
			case !follow || more == nil:
				return
			default:
				select {
				case <-more:
				case <-ctx.Done():
				}
			}
		}
	}, nil
}

// Standing returns a channel that is closed when the guest stands no longer still for a
// migration; nil: it does not.
func (v *VM) Standing() <-chan struct{} {
	v.events.eventMu.Lock()
	defer v.events.eventMu.Unlock()
	return v.events.stop
}

// stands notes whether the guest stands still for a migration.
func (l *events) stands(still bool) {
	l.eventMu.Lock()
	defer l.eventMu.Unlock()
	switch {
	case still && l.stop == nil:
		l.stop = make(chan struct{})
	case !still && l.stop != nil:
		close(l.stop)
		l.stop = nil
	}
}

// eventText is text in one line, and short.
func eventText(s string) string {
	if len(s) > maxEventText {
		s = strings.ToValidUTF8(s[:maxEventText], "") + "…"
	}
	return strings.ReplaceAll(s, "\n", "; ")
}

// logged notes as an event what is only logged: by devices, which know of no VM, and by the
// receiver.
func (v *VM) logged(device string, r slog.Record) {
	e := Event{Device: device}
	switch r.Message {
	case "the guest's kernel has panicked", "the guest's kernel has panicked, and its crash kernel takes over":
		e.Type = EventPanic
	case "storage error":
		e.Type = EventDiskError
	case "the device needs a reset":
		e.Type = EventDeviceError
	case "migration refused", "migration failed, still listening":
		e.Type, e.Message = EventRefused, r.Message
	default:
		return
	}
	r.Attrs(func(a slog.Attr) bool {
		switch a.Key {
		case "err", "request", "sector":
			if e.Message != "" {
				e.Message += ", "
			}
			e.Message += a.Key + " " + a.Value.String()
		case "peer":
			e.Address = a.Value.String()
		}
		return true
	})
	if v.events.addPaced(e) && e.Type == EventPanic {
		go v.noteState() // a vCPU does not wait for the VM
	}
}

// noteState notes the VM's state if it has changed. lifeMu is not held.
func (v *VM) noteState() {
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	v.noteStateLocked()
}

// noteStateLocked needs lifeMu.
func (v *VM) noteStateLocked() {
	if v.life != lifeNew {
		v.events.note(v.state())
	}
}

// notified returns what a migration calls at each of its steps. It calls nobody who takes a
// lock of the VM.
func (v *VM) notified(addr string, opt migrate.Options) func(migrate.Notice) {
	id, told := opt.ID, opt.Notify
	v.events.add(Event{Type: EventMigration, Migration: id, Address: addr, Phase: migrate.PhaseConnecting})
	return func(n migrate.Notice) {
		if told != nil {
			told(n)
		}
		if n.Round != (migrate.RoundStats{}) {
			v.events.add(Event{Type: EventRound, Migration: id, Round: &n.Round})
			return
		}
		v.events.stands(n.Phase == migrate.PhaseSwitchover)
		v.events.add(Event{Type: EventMigration, Migration: id, Address: addr, Phase: n.Phase, Reason: n.Reason, Message: n.Error})
		if n.Phase == migrate.PhaseHandoffUnknown {
			v.events.note(StateHandoffUnknown)
		}
	}
}
