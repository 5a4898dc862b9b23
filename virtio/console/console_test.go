package console

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/govmm/govmm/internal/charqueue"
	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
)

const base = 0x100000

// rig is a console with a driver.
type rig struct {
	t          testing.TB
	d          *Device
	mem        *virtiotest.Memory
	drivers    []*virtiotest.Driver
	queues     []*virtio.Queue
	interrupts []chan struct{}
	changed    chan struct{}
	reset      chan error
	features   uint64
	free       uint64
}

func (r *rig) ConfigChanged() { r.changed <- struct{}{} }
func (r *rig) NeedsReset(err error) {
	select {
	case r.reset <- err:
	default:
	}
}

func newRig(t testing.TB, d *Device, features uint64) *rig {
	t.Helper()
	r := &rig{t: t, changed: make(chan struct{}, 1), reset: make(chan error, 1), features: features | d.Features(), free: base}
	r.mem = virtiotest.NewMemory(t, base, 4<<20)
	for _, size := range d.QueueSizes() {
		r.drivers = append(r.drivers, virtiotest.NewDriver(t, r.mem, r.free, size, r.features))
		r.free += virtiotest.RingBytes(size)
		r.interrupts = append(r.interrupts, make(chan struct{}, 1))
	}
	r.attach(d, nil)
	t.Cleanup(func() { r.d.Reset() })
	return r
}

// attach gives the guest another console, with fresh queues or saved ones.
func (r *rig) attach(d *Device, saved []virtio.QueueState) {
	r.t.Helper()
	r.d, r.queues = d, nil
	for i, size := range d.QueueSizes() {
		irq := r.interrupts[i]
		q := virtio.NewQueue(r.mem, size, func() { signal(irq) })
		if saved == nil {
			r.drivers[i].Start(q)
		} else if err := q.Start(saved[i], r.features); err != nil {
			r.t.Fatal(err)
		}
		r.queues = append(r.queues, q)
	}
	if err := d.Activate(r.features, r.queues, r); err != nil {
		r.t.Fatal(err)
	}
	for _, q := range r.queues {
		q.Signal()
	}
}

func (r *rig) add(queue int, readable, writable []virtiotest.Buffer) {
	r.t.Helper()
	if _, ok := r.drivers[queue].Add(readable, writable); !ok {
		r.t.Fatal("the ring is full")
	}
	if r.drivers[queue].WantsKick() {
		r.queues[queue].Signal()
	}
}

func (r *rig) wait(queue int) virtiotest.Used {
	r.t.Helper()
	for {
		if u, ok := r.drivers[queue].Used(); ok {
			return u
		}
		select {
		case <-r.interrupts[queue]:
		case err := <-r.reset:
			r.t.Fatal(err)
		}
	}
}

// send puts text at an address and makes it available.
func (r *rig) send(gpa uint64, text string) {
	r.t.Helper()
	copy(r.drivers[transmitQueue].Bytes(gpa, uint64(len(text))), text)
	r.add(transmitQueue, []virtiotest.Buffer{{GPA: gpa, Len: uint32(len(text))}}, nil)
}

// terminal is a writer that the test reads from; it blocks until it does.
type terminal struct {
	r *io.PipeReader
	w *io.PipeWriter
}

func newTerminal() *terminal {
	r, w := io.Pipe()
	return &terminal{r, w}
}

func (p *terminal) Write(b []byte) (int, error) { return p.w.Write(b) }

func (p *terminal) read(t testing.TB, n int) string {
	t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(p.r, b); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func newConsole(t testing.TB, c Config) (*Device, *terminal) {
	term := newTerminal()
	d := New(c, term)
	t.Cleanup(func() {
		term.r.Close()
		d.Reset()
		if err := d.Close(); err != nil && !errors.Is(err, io.ErrClosedPipe) {
			t.Error(err)
		}
	})
	return d, term
}

var layouts = map[string]uint64{
	"split":  virtio.FeatureVersion1,
	"packed": virtio.FeatureVersion1 | virtio.FeatureRingPacked | virtio.FeatureEventIdx,
}

func TestOutput(t *testing.T) {
	for name, features := range layouts {
		t.Run(name, func(t *testing.T) {
			d, term := newConsole(t, Config{})
			r := newRig(t, d, features)
			r.add(transmitQueue, []virtiotest.Buffer{{GPA: r.free, Len: 0}, {GPA: r.free, Len: 2}, {GPA: r.free + 5000, Len: 3}}, nil)
			r.wait(transmitQueue)
			copy(r.drivers[transmitQueue].Bytes(r.free, 2), "he")
			copy(r.drivers[transmitQueue].Bytes(r.free+5000, 3), "llo")
			term.read(t, 5) // zeros
			r.add(transmitQueue, []virtiotest.Buffer{{GPA: r.free, Len: 2}, {GPA: r.free + 5000, Len: 3}}, nil)
			if got := term.read(t, 5); got != "hello" { // without a newline, after a while
				t.Fatalf("%q", got)
			}
			if u := r.wait(transmitQueue); u.Len != 0 {
				t.Fatalf("length %d", u.Len)
			}
		})
	}
}

// A writer that does not write keeps the guest's requests in its ring, and does
// not keep a pause waiting.
func TestBackpressure(t *testing.T) {
	d, term := newConsole(t, Config{})
	r := newRig(t, d, layouts["split"])
	const chunk, chunks = 20 << 10, 8 // more than twice what is queued
	var sent strings.Builder
	for i := range chunks {
		text := strings.Repeat(string(rune('a'+i)), chunk)
		sent.WriteString(text)
		r.send(r.free+uint64(i)*chunk, text)
	}
	for range charqueue.Size / chunk {
		r.wait(transmitQueue)
	}
	if err := d.Pause(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := r.queues[transmitQueue].SaveState(); err != nil {
		t.Fatal(err)
	}
	if _, ok := r.drivers[transmitQueue].Used(); ok {
		t.Fatal("more was taken than there is room for")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := d.Resume(); err != nil {
		t.Fatal(err)
	}
	if err := d.Drain(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("drain: %v", err)
	}
	r.queues[transmitQueue].Signal()
	if got := term.read(t, chunk*chunks); got != sent.String() {
		t.Fatal("other output")
	}
	if err := d.Drain(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// A move in the middle of output: what was sent is printed once, by the one or
// by the other, and the line that is cut by the one that goes on.
func TestMove(t *testing.T) {
	for name, features := range layouts {
		t.Run(name, func(t *testing.T) {
			d, here := newConsole(t, Config{})
			r := newRig(t, d, features)
			text := strings.Repeat("0123456789abcdef", 12<<10/16) + "\n"
			const n = 10
			for i := range n {
				r.send(r.free+uint64(i)*16<<10, text)
			}
			for range charqueue.Size / len(text) {
				r.wait(transmitQueue)
			}
			for r.d.out.Room() > 0 { // the next line is taken in part
				runtime.Gosched()
			}
			if got := r.d.Feed([]byte("typed")); got != 5 {
				t.Fatalf("fed %d", got)
			}
			if err := r.d.Pause(context.Background()); err != nil {
				t.Fatal(err)
			}
			var saved []virtio.QueueState
			for _, q := range r.queues {
				s, err := q.SaveState()
				if err != nil {
					t.Fatal(err)
				}
				saved = append(saved, s)
			}
			state, err := r.d.SaveState()
			if err != nil {
				t.Fatal(err)
			}
			var s State
			if err := strictcbor.Unmarshal(state, &s); err != nil || s.Offset == 0 || len(s.Line) == 0 || string(s.Input) != "typed" {
				t.Fatalf("offset %d, line of %d bytes, input %q, %v", s.Offset, len(s.Line), s.Input, err)
			}
			// What the one prints, before and after it was saved.
			old := r.d
			drained := make(chan error, 1)
			go func() {
				err := old.Drain(context.Background())
				here.w.Close()
				drained <- err
			}()
			first, err := io.ReadAll(here.r)
			if err != nil {
				t.Fatal(err)
			}
			if err := <-drained; err != nil {
				t.Fatal(err)
			}
			old.Reset()

			dst, there := newConsole(t, Config{})
			if err := dst.LoadState(state); err != nil {
				t.Fatal(err)
			}
			if again, err := dst.SaveState(); err != nil || !bytes.Equal(again, state) {
				t.Fatalf("saved again: other bytes, %v", err)
			}
			r.attach(dst, saved)
			second := there.read(t, n*len(text)-len(first))
			if string(first)+second != strings.Repeat(text, n) {
				t.Fatal("other output")
			}
			if len(first) > 0 && first[len(first)-1] != '\n' && len(first) < charqueue.MaxLine {
				t.Error("a line was cut")
			}
			r.add(receiveQueue, nil, []virtiotest.Buffer{{GPA: r.free, Len: 100}})
			if u := r.wait(receiveQueue); u.Len != 5 || string(r.drivers[receiveQueue].Bytes(r.free, 5)) != "typed" {
				t.Fatalf("input of %d bytes", u.Len)
			}
		})
	}
}

// text is input; it has an end.
type text struct{ r *strings.Reader }

func (s text) ReadInput(ctx context.Context, p []byte) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	return s.r.Read(p)
}

// Input comes before the driver and beyond what there is room for; it waits for
// buffers, arrives whole, and is marked.
func TestInput(t *testing.T) {
	for name, features := range layouts {
		t.Run(name, func(t *testing.T) {
			d, _ := newConsole(t, Config{})
			all := strings.Repeat("the quick brown fox ", 1000)
			served := make(chan error, 1)
			go func() { served <- d.Serve(context.Background(), text{strings.NewReader(all)}) }()
			r := newRig(t, d, features)
			var got strings.Builder
			before := r.mem.Snapshot()
			for got.Len() < len(all) {
				r.add(receiveQueue, nil, []virtiotest.Buffer{{GPA: r.free + 4090, Len: 3}, {GPA: r.free + 9000, Len: 700}})
				u := r.wait(receiveQueue)
				b := append(bytes.Clone(r.drivers[receiveQueue].Bytes(r.free+4090, 3)), r.drivers[receiveQueue].Bytes(r.free+9000, 700)...)
				if u.Len == 0 || u.Len > 703 {
					t.Fatalf("length %d", u.Len)
				}
				got.Write(b[:u.Len])
			}
			if got.String() != all {
				t.Fatal("other input")
			}
			for _, gpa := range r.mem.Unmarked(before) {
				if gpa >= r.free {
					t.Errorf("written and not marked: %#x", gpa)
				}
			}
			if err := <-served; err != nil {
				t.Fatal(err)
			}
		})
	}
}

// Without buffers of the guest no more is read than there is room for.
func TestInputFlow(t *testing.T) {
	d, _ := newConsole(t, Config{})
	in := strings.NewReader(strings.Repeat("x", 3*maxInput))
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- d.Serve(ctx, text{in}) }()
	for d.Feed(nil); ; {
		d.serving.Lock()
		full := len(d.input) == maxInput
		d.serving.Unlock()
		if full {
			break
		}
	}
	cancel()
	if err := <-served; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if in.Len() != 2*maxInput {
		t.Fatalf("%d bytes are left to read", in.Len())
	}
	if n := d.Feed([]byte("more")); n != 0 {
		t.Fatalf("fed %d", n)
	}
}

func TestConfig(t *testing.T) {
	d, term := newConsole(t, Config{Columns: 80, Rows: 25})
	b := make([]byte, 16)
	d.ReadConfig(0, b)
	if binary.LittleEndian.Uint16(b) != 80 || binary.LittleEndian.Uint16(b[2:]) != 25 || b[4] != 1 {
		t.Fatalf("% x", b)
	}
	d.ReadConfig(1<<32-1, make([]byte, 4))
	d.SetSize(100, 30) // there is no driver
	r := newRig(t, d, layouts["split"])
	d.SetSize(100, 30) // no change
	d.SetSize(132, 43)
	<-r.changed
	select {
	case <-r.changed:
		t.Fatal("told twice")
	default:
	}
	// An emergency write works in every state.
	d.Reset()
	for off := range uint32(configBytes) {
		d.WriteConfig(off, []byte{'!', 0, 0, 0}[:1])
	}
	d.WriteConfig(offEmergency, []byte{'?', 0, 0, 0})
	d.WriteConfig(offEmergency-2, []byte{1, 2, '\n', 4})
	if got := term.read(t, 3); got != "!?\n" {
		t.Fatalf("%q", got)
	}
	d.WriteConfig(1<<32-1, []byte{1, 2})
}

func TestBrokenRing(t *testing.T) {
	for queue := range 2 {
		d, _ := newConsole(t, Config{})
		r := newRig(t, d, layouts["split"])
		d.Feed([]byte("x"))
		b := []virtiotest.Buffer{{GPA: 0, Len: 64}}
		if queue == receiveQueue {
			r.add(queue, nil, b)
		} else {
			r.add(queue, b, nil)
		}
		if err := <-r.reset; !errors.Is(err, virtio.ErrRing) {
			t.Fatal(err)
		}
	}
}

// A writer that fails loses output, and nothing else.
func TestWriterFails(t *testing.T) {
	why := errors.New("broken")
	term := newTerminal()
	term.r.CloseWithError(why)
	d := New(Config{}, term)
	r := newRig(t, d, layouts["split"])
	for range 20 {
		r.send(r.free, strings.Repeat("y", 8<<10))
		r.wait(transmitQueue)
	}
	d.Reset()
	if err := d.Close(); !errors.Is(err, why) {
		t.Fatal(err)
	}
	if n := d.out.Put([]byte("z")); n != 1 {
		t.Fatal("a closed console takes no output")
	}
}

func TestState(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		s := State{
			Columns: rapid.Uint16().Draw(rt, "columns"), Rows: rapid.Uint16().Draw(rt, "rows"),
			Input:  rapid.SliceOfN(rapid.Byte(), 0, maxInput).Draw(rt, "input"),
			Line:   append([]byte{}, bytes.ReplaceAll(rapid.SliceOfN(rapid.Byte(), 0, 10000).Draw(rt, "line"), []byte("\n"), nil)...),
			Offset: rapid.Uint32().Draw(rt, "offset"),
		}
		b, err := strictcbor.Marshal(s)
		if err != nil {
			rt.Fatal(err)
		}
		d := New(Config{}, io.Discard)
		defer d.Close()
		if err := d.LoadState(b); err != nil {
			rt.Fatal(err)
		}
		if again, err := d.SaveState(); err != nil || !bytes.Equal(again, b) {
			rt.Fatalf("%x, then %x, %v", b, again, err)
		}
	})
	d := New(Config{}, io.Discard)
	defer d.Close()
	before, err := d.SaveState()
	if err != nil {
		t.Fatal(err)
	}
	for says, s := range map[string]State{
		"4096 bytes, got 4097":   {Input: make([]byte, maxInput+1)},
		"65536 bytes, got 65537": {Line: make([]byte, charqueue.Size+1)},
		"must have no newline":   {Line: []byte("a\nb")},
	} {
		b, err := strictcbor.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.LoadState(b); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("want %s: %v", says, err)
		}
	}
	for _, b := range [][]byte{nil, {0xff}, before[:len(before)-1], append(bytes.Clone(before), 0)} {
		if err := d.LoadState(b); err == nil {
			t.Errorf("% x was loaded", b)
		}
	}
	if after, err := d.SaveState(); err != nil || !bytes.Equal(after, before) {
		t.Errorf("a state that was refused changed the console: %v", err)
	}
}

// FuzzRequests gives both queues buffers of any kind: each is answered, or
// waits for input, or the ring is broken; output is what was sent.
func FuzzRequests(f *testing.F) {
	f.Add([]byte{1, 1, 10, 0, 2, 20, 1, 3, 30})
	f.Add([]byte{3, 255, 255})
	f.Fuzz(func(t *testing.T, input []byte) {
		var out bytes.Buffer
		d := New(Config{}, &out)
		r := newRig(t, d, layouts["split"])
		var wanted []byte
		for i := 0; len(input) >= 3 && i < queueSize/2; i++ {
			queue := int(input[0] & 1)
			b := virtiotest.Buffer{GPA: r.free + uint64(input[1])<<10, Len: uint32(input[2]) * 17}
			if input[0] == 255 {
				b.GPA = 1<<64 - 10
			}
			var readable, writable []virtiotest.Buffer
			if queue == transmitQueue != (input[0]&2 != 0) {
				readable = append(readable, b)
			} else {
				writable = append(writable, b)
			}
			input = input[3:]
			if queue == transmitQueue && len(readable) > 0 && b.GPA < 1<<63 {
				p := r.drivers[queue].Bytes(b.GPA, uint64(b.Len))
				for j := range p {
					p[j] = byte(i + j)
				}
				wanted = append(wanted, p...)
			}
			if _, ok := r.drivers[queue].Add(readable, writable); !ok {
				t.Fatal("the ring is full")
			}
			if queue == receiveQueue {
				d.Feed([]byte("0123456789"))
			}
			r.queues[queue].Signal()
			for answered := false; !answered; {
				if _, answered = r.drivers[queue].Used(); answered {
					break
				}
				select {
				case <-r.interrupts[queue]:
				case <-r.reset:
					return
				}
			}
		}
		if err := d.Drain(context.Background()); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out.Bytes(), wanted) {
			t.Fatalf("%d bytes of output, %d were sent", out.Len(), len(wanted))
		}
		d.Reset()
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzState loads anything: it is refused, or it is what is saved again.
func FuzzState(f *testing.F) {
	good, err := strictcbor.Marshal(State{Input: []byte("in"), Line: []byte("out"), Offset: 7})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		d, dst := New(Config{}, io.Discard), New(Config{}, io.Discard)
		defer d.Close()
		defer dst.Close()
		if d.LoadState(b) != nil {
			return
		}
		once, err := d.SaveState()
		if err != nil {
			t.Fatal(err)
		}
		if err := dst.LoadState(once); err != nil {
			t.Fatal(err)
		}
		if twice, err := dst.SaveState(); err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%x, then %x, %v", once, twice, err)
		}
	})
}
