package simtest

import (
	"errors"
	"sync"
	"time"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
)

// Driver is how the guest's balloon driver behaves. The zero value hints every page, in
// order, when it is asked.
type Driver struct {
	Absent  bool // there is no driver
	Poison  bool // it expects a pattern in free pages
	Silent  bool // it does not answer
	Endless bool // it does not say that its answer is over
	Zeroes  bool // it fills a page with zeros before it hints it (init_on_alloc)
	// Late is how long it takes before it begins its answer.
	Late time.Duration
	// Pace is how long it takes for each 64 pages.
	Pace time.Duration
	// Rest is how long it does nothing after it has hinted so many pages, if set.
	Rest func(pages uint64) time.Duration
	// Skip is how many pages at the start of each slot it does not hint.
	Skip uint64
	// TakeBack is how many of 1000 pages it takes back and writes right after it
	// hinted them.
	TakeBack int
}

// Balloon is a simulated balloon that hints free pages: a device, whose queue has a
// goroutine, and the driver in the guest. It implements [migrate.HintSource].
type Balloon struct {
	// Driver is set before the guest runs.
	Driver Driver
	// Served is called by the device while it serves a request, if set.
	Served func()

	machine *Machine
	queue   chan func(mempage.HintSink) // requests
	serving sync.Mutex                  // held while a request is served, and while the device is paused
	paused  bool                        // guarded by the machine's mutex
	closed  chan struct{}

	mu       sync.Mutex // guards what follows
	sink     mempage.HintSink
	last     uint32 // the last id that was drawn
	command  uint32
	commands []uint32      // that were announced here
	changed  chan struct{} // closed when command changes
	answered uint32        // the driver's: it ignores the id that it had last
	midway   bool          // the driver's: it was stopped in its answer
	lost     bool          // the driver was reset

	quit chan struct{} // closed to stop the driver
	wg   sync.WaitGroup
}

var (
	_ migrate.Hinting    = (*Machine)(nil)
	_ migrate.HintSource = (*Balloon)(nil)
)

// The reserved command ids, virtio 1.2 section 5.5.6.5.
const (
	commandStop = 0
	commandDone = 1
)

func newBalloon(m *Machine) *Balloon {
	b := &Balloon{machine: m, queue: make(chan func(mempage.HintSink), 8), changed: make(chan struct{}),
		closed: make(chan struct{}), last: commandDone}
	go b.serve()
	return b
}

// serve is the device's goroutine.
func (b *Balloon) serve() {
	for {
		select {
		case <-b.closed:
			return
		case request := <-b.queue:
			b.serving.Lock()
			if b.Served != nil {
				b.Served()
			}
			if s := b.getSink(); s != nil {
				request(s)
			}
			b.serving.Unlock()
		}
	}
}

// pause returns when the device is idle, and it stays so until resume.
func (b *Balloon) pause() {
	if b != nil && !b.paused {
		b.serving.Lock()
		b.paused = true
	}
}

func (b *Balloon) resume() {
	if b != nil && b.paused {
		b.paused = false
		b.serving.Unlock()
	}
}

// HintSource implements [migrate.Hinting].
func (m *Machine) HintSource() migrate.HintSource {
	if m.Balloon == nil {
		return nil
	}
	return m.Balloon
}

// SetHintSink implements [migrate.HintSource].
func (b *Balloon) SetHintSink(s mempage.HintSink) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sink = s
}

func (b *Balloon) getSink() mempage.HintSink {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.sink
}

// NewHintID implements [migrate.HintSource].
func (b *Balloon) NewHintID() (uint32, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.Driver.Absent || b.lost:
		return 0, errors.New("the simulated guest has no balloon driver")
	case b.Driver.Poison:
		return 0, errors.New("the simulated guest expects a pattern in free pages")
	}
	b.last++
	return b.last, nil
}

// AnnounceHints implements [migrate.HintSource], as do the next two.
func (b *Balloon) AnnounceHints(id uint32) { b.announce(id) }

// StopHints announces STOP.
func (b *Balloon) StopHints() { b.announce(commandStop) }

// DoneHints announces DONE.
func (b *Balloon) DoneHints() { b.announce(commandDone) }

func (b *Balloon) announce(command uint32) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.command = command
	b.commands = append(b.commands, command)
	close(b.changed)
	b.changed = make(chan struct{})
}

// Commands lists what was announced on this machine.
func (b *Balloon) Commands() []uint32 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]uint32(nil), b.commands...)
}

// Lose resets the driver for good.
func (b *Balloon) Lose() {
	b.mu.Lock()
	b.lost, b.command = true, commandStop
	sink := b.sink
	b.mu.Unlock()
	if sink != nil {
		sink.HintLost()
	}
}

// read returns the command as the driver reads it, and a channel that is closed when it
// changes.
func (b *Balloon) read() (command uint32, changed chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.command, b.changed
}

// start and stop are called as the vCPUs' are: the driver is in the guest.
func (b *Balloon) start() {
	b.quit = make(chan struct{})
	b.wg.Go(b.drive)
}

func (b *Balloon) stop() {
	close(b.quit)
	b.wg.Wait()
}

// drive is the driver.
func (b *Balloon) drive() {
	if b.midway && !b.end() {
		return
	}
	for {
		command, changed := b.read()
		if command > commandDone && command != b.answered && !b.Driver.Silent && !b.Driver.Absent {
			if !b.answer(command) {
				return
			}
			continue
		}
		select {
		case <-changed:
		case <-b.quit:
			return
		}
	}
}

// answer hints all pages, and ends early if another command comes. It returns false if
// the guest has stopped.
func (b *Balloon) answer(id uint32) bool {
	if !b.rest(b.Driver.Late) {
		return false
	}
	var hinted uint64
	if !b.send(func(s mempage.HintSink) {
		if b.current(id) {
			s.HintStart(id)
		}
	}) {
		return false
	}
	b.answered, b.midway = id, true
	for slot, s := range b.machine.Slots() {
		for first := b.Driver.Skip; first < s.Pages; first += 64 {
			if command, _ := b.read(); command != id {
				break
			}
			n := min(64, s.Pages-first)
			if !b.hint(id, slot, first, n) {
				return false
			}
			if hinted += n; b.Driver.Rest != nil && !b.rest(b.Driver.Rest(hinted)) {
				return false
			}
		}
	}
	return b.end()
}

// end says that the answer is over.
func (b *Balloon) end() bool {
	if !b.Driver.Endless && !b.send(func(s mempage.HintSink) { s.HintStop() }) {
		return false
	}
	b.midway = false
	return true
}

func (b *Balloon) hint(id uint32, slot int, first, n uint64) bool {
	m := b.machine.Memory
	for page := first; page < first+n && b.Driver.Zeroes; page++ {
		m.GuestZero(slot, page)
	}
	m.give(slot, first, n)
	sent := b.send(func(s mempage.HintSink) {
		if b.current(id) {
			s.HintPages(id, []mempage.Range{{GPA: m.Slots()[slot].GPA + first*mempage.Size, Bytes: n * mempage.Size}})
		} else {
			s.HintLate(n)
		}
	})
	for page := first; page < first+n && sent; page++ {
		if (page*7919+uint64(id))%1000 < uint64(b.Driver.TakeBack) {
			m.GuestWrite(slot, page)
		}
	}
	return b.rest(b.Driver.Pace) && sent
}

// rest does nothing for a time. It returns false if the guest has stopped.
func (b *Balloon) rest(d time.Duration) bool {
	if d == 0 {
		return true
	}
	select {
	case <-time.After(d):
		return true
	case <-b.quit:
		return false
	}
}

func (b *Balloon) current(id uint32) bool {
	command, _ := b.read()
	return command == id
}

// send makes a request available.
func (b *Balloon) send(request func(mempage.HintSink)) bool {
	select {
	case b.queue <- request:
		return true
	case <-b.quit:
		return false
	}
}

// give marks pages as given up: until they are written again, their content may differ
// between the two sides.
func (m *Memory) give(slot int, first, n uint64) {
	s := m.slots[slot]
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := first; i < first+n; i++ {
		s.pages[i].given = true
	}
}

// Given reports whether the guest has given the page's content up.
func (m *Memory) Given(slot int, page uint64) bool {
	s := m.slots[slot]
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pages[page].given
}

// balloonState moves with the machine: the device's command and last id, the last id
// that the driver answered to, and whether it was stopped during its answer.
type balloonState struct {
	Last, Command, Answered uint32
	Midway                  bool
}

func (b *Balloon) save() balloonState {
	b.mu.Lock()
	defer b.mu.Unlock()
	return balloonState{b.last, b.command, b.answered, b.midway}
}

func (b *Balloon) load(s balloonState) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.last, b.command, b.answered, b.midway = s.Last, s.Command, s.Answered, s.Midway
}
