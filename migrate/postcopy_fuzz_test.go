package migrate

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
)

// FuzzIntake: whatever a source sends on the connections for memory that comes later, the
// destination neither panics nor hangs, and lands nothing where nothing is missing.
func FuzzIntake(f *testing.F) {
	words := binary.LittleEndian.AppendUint64(nil, 0b1011)
	list := new(stream).frame(header{typ: frameMissing, count: 64}, words).frame(header{typ: frameMissing, flags: flagEnd, first: 1}, nil)
	pages := new(stream).frame(header{typ: framePages, count: 4}, pagesPayload(4, 0b1, 0b10))
	f.Add(append(append([]byte{}, list.Bytes()...), pages.Bytes()...), true)
	f.Add(new(stream).frame(header{typ: frameMissing, count: 64}, words).frame(header{typ: frameMissing, flags: flagEnd | flagPreliminary}, nil).Bytes(), false)
	f.Add(new(stream).frame(header{typ: frameMissing, slot: 9, count: 64}, words).Bytes(), true)
	f.Add(new(stream).frame(header{typ: frameMissing, first: 64, count: 64}, words).Bytes(), true)
	f.Add(new(stream).frame(header{typ: frameAlive}, nil).frame(header{typ: frameCommit}, nil).Bytes(), true)
	f.Fuzz(func(t *testing.T, in []byte, control bool) {
		if len(in) > 1<<16 {
			return
		}
		target := &heapTarget{t: t, mem: [2][]byte{make([]byte, 70*mempage.Size), make([]byte, 66*mempage.Size)}}
		intake := newIntake(sessionID{1}, identity{}, time.Minute, target)
		intake.lost = func(*conn, Missing, error) {}
		before := make([]byte, len(target.mem[1]))
		armed := make([][]uint64, 2)
		armed[0], armed[1] = make([]uint64, 2), make([]uint64, 2)
		armed[0][0] = 0b1111
		m, _ := target.Miss(armed, nil)
		intake.missing = m
		done := make(chan struct{})
		a, b := net.Pipe()
		go func() {
			defer close(done)
			h := newHello(purposeMissing, sessionID{1})
			h.channel, h.set = 1, 1
			_ = intake.serve(h, newConn(b)) // whatever comes of it
		}()
		go func() { _, _ = io.Copy(io.Discard, a) }()
		_ = a.SetWriteDeadline(time.Now().Add(10 * time.Second))
		if !control { // by another connection of the set
			for {
				intake.intakeMu.Lock()
				there := intake.set != nil
				intake.intakeMu.Unlock()
				if there {
					break
				}
				time.Sleep(time.Microsecond)
			}
			c, d := net.Pipe()
			go func() {
				h := newHello(purposeMissing, sessionID{1})
				h.channel, h.set = 2, 1
				_ = intake.serve(h, newConn(d))
			}()
			_, _ = c.Write(in)
			c.Close()
		} else {
			_, _ = a.Write(in)
		}
		a.Close()
		<-done
		intake.end()
		if string(target.mem[1]) != string(before) {
			t.Error("pages have landed that are not missing")
		}
	})
}

// FuzzServing: whatever a destination sends on the connection on which it asks, the source
// neither panics nor hangs.
func FuzzServing(f *testing.F) {
	words := binary.LittleEndian.AppendUint64(nil, 0b1011)
	f.Add(new(stream).frame(header{typ: frameWant, count: 1}, nil).frame(header{typ: frameWant, slot: 1, first: 3, count: 60}, nil).Bytes())
	f.Add(new(stream).frame(header{typ: frameMissing, count: 64}, words).frame(header{typ: frameMissing, flags: flagEnd}, nil).Bytes())
	f.Add(new(stream).control(frameStalls, Stalls{Faults: 3}).control(frameWhole, Stalls{}).Bytes())
	f.Add(new(stream).frame(header{typ: frameWant, slot: 7, count: 1}, nil).Bytes())
	f.Add(new(stream).frame(header{typ: frameWant, first: 1 << 60, count: 1 << 30}, nil).Bytes())
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > 1<<16 {
			return
		}
		src := newToySource(t, &whoRuns{t: t, who: map[string]bool{}})
		m := New(src, "", Options{Postcopy: 1})
		tracker, err := newTracker(src.Slots(), src, minClearBitmapShift)
		if err != nil {
			t.Fatal(err)
		}
		s := &serving{m: m, slots: src.Slots(), channels: 1, armed: true, committed: true, left: newBits(src.Slots())}
		s.p = &precopy{m: m, tracker: tracker, sender: &sender{ram: src, slots: src.Slots()}}
		for i, slot := range src.Slots() {
			mempage.Bitmap(s.left[i]).SetRange(0, slot.Pages)
		}
		s.pages = countBits(s.left)
		a, b := net.Pipe()
		o := &outSet{s: s, control: newConn(b), lists: make(chan [][]uint64, 1), dropped: make(chan struct{}, 1), answerer: s.newPourer()}
		o.ctx, o.cancel = context.WithCancelCause(context.Background())
		o.pulse = startPulse(o.control, time.Minute, func() bool { return true }, nil, o.cancel)
		defer o.pulse.end()
		go func() { _, _ = io.Copy(io.Discard, a) }()
		done := make(chan error, 1)
		go func() { done <- o.read() }()
		_ = a.SetWriteDeadline(time.Now().Add(10 * time.Second))
		_, _ = a.Write(in)
		a.Close()
		if err := <-done; err == nil {
			t.Error("the connection has ended, and nobody says so")
		}
		b.Close()
	})
}
