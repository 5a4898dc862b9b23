package migrate

import (
	"testing"

	"github.com/govmm/govmm/mempage"
)

func stateOf(stop uint64, state string) *stream {
	return new(stream).frame(header{typ: frameState, first: stop}, []byte(state))
}

func undoOf(stop uint64, flags uint8) *stream {
	return new(stream).frame(header{typ: frameUndo, first: stop, flags: flags}, nil)
}

func commitOf(stop uint64) *stream {
	return new(stream).frame(header{typ: frameCommit, first: stop}, nil)
}

func pageAt(first uint64, c byte) *stream {
	return new(stream).frame(header{typ: framePages, first: first, count: 1}, onePage(c))
}

// A stop may be undone at any moment before COMMIT: before its last page has landed, or
// after the state has been loaded, or before STATE. Pages come as before, and the state of
// the next stop counts.
func TestUndo(t *testing.T) {
	p := newPipeSession(t)
	p.open(2, true)

	// Of stop 1 some pages and the state have come.
	p.write(p.data[0], pageAt(0, 'a'))
	p.write(p.control, stateOf(1, "one"))
	p.write(p.control, undoOf(1, 0))
	for _, c := range p.data {
		p.write(c, new(stream).frame(round(5, flagQuiet), nil))
	}

	// Of stop 2 everything has, and it is loaded. PREPARED may be on its way.
	p.write(p.data[1], pageAt(64, 'b'))
	last := func(n uint64) {
		for _, c := range p.data {
			p.write(c, new(stream).frame(round(n, flagLast), nil))
		}
	}
	last(6)
	// It may have loaded state 1 before it read UNDO: that PREPARED is ignored.
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_, _ = p.control.Write(stateOf(2, "two").Bytes())
	}()
	h := p.read(p.control, framePrepared)
	if h.first == 1 {
		h = p.read(p.control, framePrepared)
	}
	if h.first != 2 {
		t.Errorf("prepared for stop %d", h.first)
	}
	<-sent
	p.write(p.control, undoOf(2, flagLast))

	// A round, and stop 3, undone before STATE.
	p.write(p.data[0], pageAt(0, 'c'))
	for _, c := range p.data {
		p.write(c, new(stream).frame(round(7, 0), nil))
	}
	p.read(p.control, frameRound)
	last(8)
	p.write(p.control, undoOf(3, flagLast))

	p.write(p.data[1], pageAt(64, 'd'))
	last(9)
	p.write(p.control, stateOf(4, "four"))
	if h := p.read(p.control, framePrepared); h.first != 4 {
		t.Errorf("prepared for stop %d", h.first)
	}
	p.write(p.control, commitOf(4))
	p.read(p.control, frameRunning)
	if !p.target.started || string(p.target.loaded) != "four" {
		t.Errorf("started: %v, from state %q", p.target.started, p.target.loaded)
	}
	if a, b := p.target.mem[0][0], p.target.mem[0][64*mempage.Size]; a != 'c' || b != 'd' {
		t.Errorf("pages begin with %q and %q", a, b)
	}
}

// A COMMIT or an UNDO counts only for the stop whose state came last.
func TestUndoOfAnotherStop(t *testing.T) {
	for name, c := range map[string]struct{ says *stream }{
		"COMMIT of the stop before":    {commitOf(1)},
		"COMMIT of a stop to come":     {commitOf(3)},
		"UNDO of the stop before":      {undoOf(1, flagLast)},
		"UNDO with a payload":          {new(stream).frame(header{typ: frameUndo, first: 2}, []byte("x"))},
		"STATE of the same stop":       {stateOf(2, "again")},
		"COMMIT after its stop's UNDO": {func() *stream { s := undoOf(2, flagLast); s.Write(commitOf(2).Bytes()); return s }()},
		"the same UNDO twice":          {func() *stream { s := undoOf(2, flagLast); s.Write(undoOf(2, 0).Bytes()); return s }()},
		"nothing wrong":                {nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPipeSession(t)
			p.open(1, true)
			p.write(p.data[0], new(stream).frame(round(0, flagLast), nil))
			p.write(p.control, stateOf(2, "two"))
			p.read(p.control, framePrepared)
			if c.says == nil {
				p.write(p.control, commitOf(2))
				p.read(p.control, frameRunning)
				return
			}
			go func() { _, _ = p.control.Write(c.says.Bytes()) }()
			p.read(p.control, frameFailed)
			if p.target.started {
				t.Error("the guest was started")
			}
		})
	}
}

// A destination that cannot forget a state ends the migration.
func TestUndoThatFails(t *testing.T) {
	p := newPipeSession(t)
	p.open(1, true)
	p.write(p.data[0], new(stream).frame(round(0, flagLast), nil))
	p.write(p.control, stateOf(1, "sticky"))
	p.read(p.control, framePrepared)
	p.write(p.control, undoOf(1, flagLast))
	p.read(p.control, frameFailed)
	if p.target.started {
		t.Error("the guest was started")
	}
}
