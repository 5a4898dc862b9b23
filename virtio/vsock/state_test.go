package vsock

import (
	"bytes"
	"encoding/binary"
	"path/filepath"
	"testing"

	"pgregory.net/rapid"

	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// event waits for an event of the device.
func (r *rig) event(gpa uint64) {
	r.t.Helper()
	u := r.wait(eventQueue)
	if id := binary.LittleEndian.Uint32(r.drivers[eventQueue].Bytes(gpa, 4)); u.Len != eventBytes || id != eventTransportReset {
		r.t.Fatalf("event %d of %d bytes", id, u.Len)
	}
}

// A guest that moves: its connections end here, and it learns there that they
// have, as soon as it can be told.
func TestMove(t *testing.T) {
	each(t, func(t *testing.T, r *rig) {
		old := r.d
		c, p := r.connect(1)
		p.send(opData, 0, []byte("sent here"))
		c.want("sent here")
		waiting := dial(t, r.path)
		waiting.say("CONNECT 2\n")
		h, _ := r.recv()

		saved := r.save()
		state, err := r.d.SaveState()
		check(t, err)
		check(t, r.d.Unlisten())
		dst := newDevice(t, r.path)
		check(t, dst.LoadState(state))
		if again, err := dst.SaveState(); err != nil || !bytes.Equal(again, state) {
			t.Fatalf("saved again: other bytes, %v", err)
		}
		old.Reset()
		check(t, old.Close())
		c.end()
		waiting.end()

		r.attach(dst, saved)
		t.Cleanup(dst.Reset)
		gpa := r.txGPA() + txBytes
		copy(r.drivers[eventQueue].Bytes(gpa, 4), "\xff\xff\xff\xff")
		r.add(eventQueue, nil, []virtiotest.Buffer{{GPA: gpa, Len: eventBytes}})
		r.event(gpa)
		r.add(eventQueue, nil, []virtiotest.Buffer{{GPA: gpa, Len: eventBytes}})
		// What the guest still says on the old ones is answered.
		p.send(opData, 0, []byte("lost"))
		p.expect(opReset)
		late := &peer{r: r, host: h.SrcPort, guest: 2}
		late.send(opResponse, 0, nil)
		late.expect(opReset)
		// New ones are none of the old.
		c, q := r.connect(1)
		if q.host == p.host || q.host == h.SrcPort {
			t.Errorf("port %d again", q.host)
		}
		q.send(opData, 0, []byte("sent there"))
		c.want("sent there")
		if _, ok := r.drivers[eventQueue].Used(); ok {
			t.Error("the guest is told twice")
		}
	})
}

// The guest gave event buffers long before, as drivers do; and a connection
// that it asked for and was not answered about is refused at the destination.
func TestMoveWhileConnecting(t *testing.T) {
	r := newBareRig(t, layouts["packed"])
	gpa := r.txGPA() + txBytes
	r.add(eventQueue, nil, []virtiotest.Buffer{{GPA: gpa, Len: eventBytes}})
	l := r.listen(52)
	p := &peer{r: r, host: 52, guest: 1000, alloc: 4096}
	p.send(opRequest, 0, nil)
	c, err := l.AcceptUnix()
	check(t, err)
	saved := r.save()
	state, err := r.d.SaveState()
	check(t, err)
	check(t, r.d.Unlisten())
	dst := newDevice(t, r.path)
	check(t, dst.LoadState(state))
	r.d.Reset()
	check(t, r.d.Close())
	newClient(t, c).end()
	r.attach(dst, saved)
	t.Cleanup(dst.Reset)
	r.event(gpa)
	r.post(r.free)
	p.expect(opReset)
}

// A migration that is cancelled: connections live on, and the socket is back.
func TestMoveCancelled(t *testing.T) {
	each(t, func(t *testing.T, r *rig) {
		c, p := r.connect(1)
		r.save()
		_, err := r.d.SaveState()
		check(t, err)
		check(t, r.d.Unlisten())
		dst := newDevice(t, r.path)
		check(t, dst.Unlisten())
		c.say("meanwhile")
		check(t, r.d.Listen())
		check(t, r.d.Resume())
		for _, q := range r.queues {
			q.Signal()
		}
		if got := p.read(9); got != "meanwhile" {
			t.Errorf("%q", got)
		}
		p.send(opData, 0, []byte("still here"))
		c.want("still here")
		r.connect(2)
	})
}

func drawState(t *rapid.T) State {
	s := State{
		CID:      guestCID,
		NextPort: rapid.Uint32Range(firstPort, 1<<32-2).Draw(t, "port"), Resets: []Reset{},
	}
	for range rapid.IntRange(0, 20).Draw(t, "resets") {
		s.Resets = append(s.Resets, Reset{
			CID: rapid.Uint64().Draw(t, "cid"), HostPort: rapid.Uint32().Draw(t, "host"),
			GuestPort: rapid.Uint32().Draw(t, "guest"), Type: rapid.Uint16().Draw(t, "type"),
		})
	}
	return s
}

func TestStateRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "v")
	rapid.Check(t, func(t *rapid.T) {
		once, err := strictcbor.Marshal(drawState(t))
		if err != nil {
			t.Fatal(err)
		}
		d, err := New(Config{CID: guestCID, Path: path}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.LoadState(once); err != nil {
			t.Fatal(err)
		}
		if twice, err := d.SaveState(); err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%x, then %x, %v", once, twice, err)
		}
	})
}

func TestStateRefused(t *testing.T) {
	d, err := New(Config{CID: guestCID, Path: "v"}, nil)
	check(t, err)
	before, err := d.SaveState()
	check(t, err)
	good := State{CID: guestCID, NextPort: firstPort}
	with := func(change func(*State)) State {
		s := good
		change(&s)
		return s
	}
	for name, s := range map[string]any{
		"CID":        with(func(s *State) { s.CID++ }),
		"a low port": with(func(s *State) { s.NextPort = firstPort - 1 }),
		"port any":   with(func(s *State) { s.NextPort = 1<<32 - 1 }),
		"too much":   with(func(s *State) { s.Resets = make([]Reset, maxResetsSaved+1) }),
		"a field":    map[string]int{"next_port": firstPort, "colour": 1},
		"nothing":    nil,
	} {
		b, err := strictcbor.Marshal(s)
		check(t, err)
		if d.LoadState(b) == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if d.LoadState(nil) == nil || d.LoadState([]byte{0xff}) == nil {
		t.Error("rubbish is taken")
	}
	if after, err := d.SaveState(); err != nil || !bytes.Equal(before, after) {
		t.Errorf("a state that was refused changed the device: %v", err)
	}
}
