package migrate_test

// The threads of a world: what each move does, and what it prints.

// guest is a move of the guest, its driver or its devices.
func (w *world) guest(do act, p uint8) {
	at := w.hot[p]
	switch do {
	case guestWrites:
		w.write(p)
		w.say("guest", "%s %v (#%d)", w.takesBack(p, "writes", "and writes"), at, w.content[p])
		w.log.guestWrite(at.slot, at.page)
		w.use[p] = inUse
	case guestTakes:
		w.say("guest", "takes %v back", at)
		w.use[p] = inUse
	case guestFrees:
		w.say("guest", "frees %v", at)
		w.use[p] = free
	case guestHints:
		w.say("guest", "hints %v under id %d", at, w.active)
		w.use[p] = given
		w.now++
		w.hinted[p], w.given[p] = w.now, w.announced[w.active]
		w.queue = append(w.queue, buffer{pageBuffer, p})
	case guestSees:
		w.seen = w.config
		if w.session {
			w.ends()
		}
		if w.seen == idStop {
			w.say("guest", "sees STOP")
			return
		}
		w.active, w.session = w.seen, true
		w.queue = append(w.queue, buffer{kind: startBuffer})
		w.say("guest", "sees id %d, queues START", w.active)
	case guestEnds:
		w.ends()
	case deviceWrites:
		w.write(p)
		w.say("device", "%s %v (#%d)", w.takesBack(p, "writes", "for the guest, and writes"), at, w.content[p])
		w.use[p], w.landed[p] = inUse, true
	case deviceMarks:
		w.say("device", "marks %v in the VMM's log", at)
		w.mark(p)
	}
}

// mark records a write of the VMM that has landed.
func (w *world) mark(p uint8) {
	w.now++
	w.marked[p], w.landed[p], w.out[p] = w.now, false, false
	w.log.deviceMark(w.hot[p].slot, w.hot[p].page)
}

// write changes a page's content.
func (w *world) write(p uint8) {
	w.now++
	w.content[p], w.out[p] = w.now, false
	if w.use[p] == given {
		w.seenBy.takenBack++
	}
}

// takesBack is the text for a write to a page, which the guest may have taken back first.
func (w *world) takesBack(p uint8, write, after string) string {
	if w.print == nil || w.use[p] == inUse {
		return write
	}
	return "takes back " + after
}

func (w *world) ends() {
	w.say("guest", "queues STOP under id %d", w.active)
	w.queue = append(w.queue, buffer{kind: stopBuffer})
	w.session = false
}

// hintThread is a move of the thread that serves the hint queue.
func (w *world) hintThread(do act) error {
	if do == hintsApply {
		h := w.hand[0]
		w.hand = append(w.hand[:0], w.hand[1:]...)
		return w.apply(h)
	}
	b := w.queue[0]
	w.queue = append(w.queue[:0], w.queue[1:]...)
	switch b.kind {
	case startBuffer:
		// The buffer is the driver's variable: its value may have changed since the
		// driver queued the buffer.
		w.lastSeen, w.started = w.active, 0
		if w.active == w.config {
			w.started = w.active
		}
		w.say("hints", "takes START, reads id %d", w.active)
	case stopBuffer:
		w.started = 0
		w.answered = w.answered || w.lastSeen == w.lastID && !w.begun
		w.say("hints", "takes STOP")
	case pageBuffer:
		if w.started == 0 {
			w.say("hints", "takes the hint of %v: of no id that counts", w.hot[b.page])
			w.seenBy.dropped++
			return nil
		}
		w.say("hints", "takes the hint of %v, under id %d", w.hot[b.page], w.started)
		w.hand = append(w.hand, taken{w.started, b.page})
	}
	return nil
}

// apply gives a hint to the tracker.
func (w *world) apply(h taken) error {
	p := w.hot[h.page]
	before := w.tracker.InToSend(p.slot, p.page)
	w.say("hints", "tells the tracker: %v, id %d", p, h.id)
	defer w.call(false)()
	w.inHint = true
	err := w.policy.apply(w.tracker, h.id, p, 1)
	w.inHint = false
	if err != nil {
		return err
	}
	switch after := w.tracker.InToSend(p.slot, p.page); {
	case before && !after:
		w.say("", "%v need not be sent", p)
		w.out[h.page] = max(w.content[h.page], w.marked[h.page]) < w.epochAt
		w.seenBy.took++
	case after && w.content[h.page] > w.given[h.page]:
		w.seenBy.leftWritten++
	case w.underWay(h.page):
		w.seenBy.underWay++
	}
	if h.id != w.config {
		w.seenBy.late++
	}
	return nil
}

// migrationThread is a move of the thread that sends.
func (w *world) migrationThread(do act, p uint8) error {
	at := w.hot[p]
	switch do {
	case syncs:
		w.say("migration", "syncs")
		return w.fetches(w.tracker.Sync)
	case refetches:
		w.say("migration", "fetches slot %d", at.slot)
		return w.fetches(func() error {
			_, err := w.tracker.SyncSlot(at.slot)
			return err
		})
	case picks:
		_, err := w.pick(at.slot, at.page)
		return err
	case reads:
		w.read()
	case sends:
		w.send()
	case endsHints:
		w.say("migration", "ends the epoch, announces STOP")
		w.tracker.EndHintEpoch()
		w.config = idStop
	case beginsEpoch:
		return w.begin()
	case announces:
		w.announce()
	case stopsGuest:
		w.say("migration", "stops the guest, drains its devices")
		w.stopped = true
		for i, landed := range w.landed {
			if landed {
				w.mark(uint8(i))
			}
		}
	case undoesStop:
		w.stopped, w.last = false, false
		w.say("migration", "undoes the stop: the guest goes on")
	case syncsLast:
		w.say("migration", "syncs for the last time")
		w.last = true
		return w.fetches(w.tracker.Sync)
	}
	return nil
}

// begin begins a new epoch, by the policy.
func (w *world) begin() error {
	w.lastID++
	w.say("migration", "begins the epoch of id %d", w.lastID)
	w.now++
	w.epochAt = w.now
	w.begun, w.answered = true, false
	clear(w.out)
	if w.policy.announceFirst {
		w.announce()
	}
	return w.fetches(func() error { return w.policy.begin(w.tracker, w.lastID) })
}

func (w *world) announce() {
	w.say("migration", "announces id %d", w.lastID)
	w.now++
	w.announced[w.lastID] = w.now
	w.config, w.begun = w.lastID, false
	w.seenBy.epochs++
}

// fetches makes a call that fetches the log, and checks which hints it undid.
func (w *world) fetches(call func() error) error {
	defer w.call(w.log.clearing >= 0)() // one during a CLEAR holds the mutex until it ends
	if err := call(); err != nil {
		return err
	}
	for i, out := range w.out {
		if p := w.hot[i]; out && w.tracker.InToSend(p.slot, p.page) {
			w.out[i] = false
			w.outcome.undone = append(w.outcome.undone, uint8(i))
			w.say("undone", "the hint of %v: it is to be sent again, and was not written", p)
		}
	}
	return nil
}

// call notes that a call of the tracker begins, which holds its mutex or is free to let go
// of it during a CLEAR. It returns what ends the call, which may be one within another.
func (w *world) call(held bool) func() {
	inCall, was := w.inCall, w.held
	w.inCall, w.held = true, held
	return func() { w.inCall, w.held = inCall, was }
}

// pick takes a batch. Pages that are not places have no content, and are sent at once.
func (w *world) pick(slot int, from uint64) (next uint64, err error) {
	w.say("migration", "picks from %v on", place{slot, from})
	end := w.call(false)
	first, n, err := w.tracker.Pick(slot, from, w.layout.batch*64, w.picked)
	end()
	if err != nil {
		return 0, err
	}
	for i, word := range w.picked[:(n+63)/64] {
		hot := w.hotBits[slot][first/64+uint64(i)]
		w.batch[slot][first/64+uint64(i)] = word & hot
		w.coldGot[slot][first/64+uint64(i)] |= word &^ hot
	}
	if w.print != nil {
		w.say("", "picked: %v", w.names(slot, 0, w.batch[slot]))
	}
	return first + n, nil
}

func (w *world) read() {
	at, _ := w.lowest()
	w.batch[at.slot][at.page/64] &^= 1 << (at.page % 64)
	p := w.index(at)
	w.say("migration", "reads %v (#%d)", at, w.content[p])
	w.wire = append(w.wire, sent{p, w.content[p]})
}

func (w *world) send() {
	s := w.wire[0]
	w.wire = append(w.wire[:0], w.wire[1:]...)
	w.say("migration", "sends %v (#%d)", w.hot[s.page], s.content)
	w.got[s.page] = s.content
}
