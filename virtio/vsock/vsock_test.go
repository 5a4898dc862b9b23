package vsock

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/virtio"
)

func TestIdentity(t *testing.T) {
	r := newRig(t, layouts["split"])
	var b [12]byte
	r.d.ReadConfig(0, b[:])
	if binary.LittleEndian.Uint64(b[:]) != guestCID || b[8] != 0 {
		t.Errorf("configuration %x", b)
	}
	r.d.ReadConfig(8, b[:])
	if r.d.ID() != 19 || len(r.d.QueueSizes()) != 3 || r.d.Features() != 1 || r.d.Config().Path != r.path {
		t.Errorf("%d %v %#x", r.d.ID(), r.d.QueueSizes(), r.d.Features())
	}
	if err := r.d.Activate(0, r.queues, r); err == nil {
		t.Error("activated twice")
	}
}

func TestHostConnects(t *testing.T) {
	each(t, func(t *testing.T, r *rig) {
		before := r.mem.Snapshot()
		c, p := r.connect(1234)
		c.say("hello")
		if got := p.read(5); got != "hello" {
			t.Errorf("%q", got)
		}
		p.send(opData, 0, []byte("world"))
		c.want("world")
		if r.d.Connections() != 1 {
			t.Errorf("%d connections", r.d.Connections())
		}
		// What the driver wrote itself is not the device's to mark.
		written := r.free + rxBuffers*rxBytes
		for _, gpa := range r.mem.Unmarked(before) {
			if gpa >= r.free && gpa < written {
				t.Errorf("a receive buffer at gpa %#x was written and not marked", gpa)
			}
		}
	})
}

// A path may be longer than a socket address, since it is absolute: both directions work.
func TestLongPath(t *testing.T) {
	base := t.TempDir()
	long := filepath.Join(base, strings.Repeat("d", 200))
	if err := os.Mkdir(long, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", long)
	r := newRig(t, layouts["split"])
	short := filepath.Join(base, "s")
	if err := os.Symlink(filepath.Dir(r.path), short); err != nil {
		t.Fatal(err)
	}
	r.path = filepath.Join(short, filepath.Base(r.path)) // for the test's own sockets
	c, p := r.request(r.listen(52), 1025, 52)
	p.send(opData, 0, []byte("from the guest"))
	c.want("from the guest")
	dial(t, r.path).say("CONNECT 1\n")
	r.recv()
}

func TestGuestConnects(t *testing.T) {
	each(t, func(t *testing.T, r *rig) {
		c, p := r.request(r.listen(52), 1025, 52)
		p.send(opData, 0, []byte("from the guest"))
		c.want("from the guest")
		c.say("from the host")
		if got := p.read(13); got != "from the host" {
			t.Errorf("%q", got)
		}
		// A connection with the ports of one that exists is refused.
		p.send(opRequest, 0, nil)
		p.expect(opReset)
		c.end()
	})
}

func TestRefused(t *testing.T) {
	r := newRig(t, layouts["split"])
	t.Run("no listener on the host", func(t *testing.T) {
		p := &peer{r: r, host: 99, guest: 1000, alloc: 4096}
		p.send(opRequest, 0, nil)
		p.expect(opReset)
		r.gone(0)
	})
	t.Run("no listener in the guest", func(t *testing.T) {
		c := dial(t, r.path)
		c.say("CONNECT 80\n")
		h, _ := r.recv()
		p := &peer{r: r, host: h.SrcPort, guest: 80}
		p.send(opReset, 0, nil)
		c.end()
		r.gone(0)
	})
	for _, line := range []string{"HELLO 1\n", "CONNECT\n", "CONNECT x\n", "CONNECT 4294967296\n", "CONNECT -1\n", strings.Repeat("a", 100)} {
		t.Run("line "+line[:5], func(t *testing.T) {
			c := dial(t, r.path)
			c.say(line)
			var one [1]byte
			if n, err := c.Read(one[:]); n != 0 || err == nil { // the end, or a reset, for what was not read
				t.Errorf("%d bytes, %v", n, err)
			}
		})
	}
	t.Run("says nothing", func(t *testing.T) {
		c := dial(t, r.path)
		check(t, c.CloseWrite())
		c.end()
	})
	r.idle()
	t.Run("no driver", func(t *testing.T) {
		r.d.Reset()
		c := dial(t, r.path)
		c.say("CONNECT 80\n")
		c.end()
	})
}

// pattern is bytes that do not repeat soon.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i) ^ byte(i>>8) ^ byte(i>>16)
	}
	return b
}

// Much more than all buffers goes both ways at once, with a guest whose buffer
// is small: neither side gets more than it has room for, and nothing is lost.
func TestBulk(t *testing.T) {
	each(t, func(t *testing.T, r *rig) {
		const size = 1 << 20
		data := pattern(size)
		c, p := r.connect(5000)
		p.alloc = 10000
		p.send(opCreditUpdate, 0, nil)
		go func() { _, _ = c.Write(data) }() // what fails is missing below
		back := make(chan []byte, 1)
		go func() {
			b := make([]byte, size)
			n, _ := io.ReadFull(c.lines, b)
			back <- b[:n]
		}()
		var got []byte
		for left := data; len(got) < size || len(left) > 0; {
			if n := min(len(left), int(p.credit()), 60000); n > 0 {
				p.send(opData, 0, left[:n])
				left = left[n:]
				continue
			}
			h, payload := r.recv()
			p.saw(h)
			got = append(got, payload...)
			p.fwd += h.Len
			// It tells of room when it is asked, or has none.
			if h.Op == opCreditRequest || p.got+rxBytes > p.fwd+p.alloc {
				p.send(opCreditUpdate, 0, nil)
			}
		}
		if !bytes.Equal(got, data) {
			t.Error("the guest got something else")
		}
		if !bytes.Equal(<-back, data) {
			t.Error("the host's program got something else")
		}
	})
}

// A program of the host that does not read stops the guest, not the device.
func TestSlowReader(t *testing.T) {
	r := newRig(t, layouts["split"])
	c, p := r.connect(6000)
	check(t, c.SetReadBuffer(4096))
	data := pattern(4 << 20)
	sent := 0
	for full := 0; full < 10; { // until what the kernel and the device keep stays full
		if n := min(int(p.credit()), 4096); n > 0 {
			p.send(opData, 0, data[sent:sent+n])
			sent, full = sent+n, 0
		} else {
			// A side without credit asks for it, and the answer is right.
			time.Sleep(5 * time.Millisecond)
			p.send(opCreditRequest, 0, nil)
			p.expect(opCreditUpdate)
			full++
		}
		for { // credit that comes without a request
			u, ok := r.drivers[receiveQueue].Used()
			if !ok {
				break
			}
			h, _ := r.take(u)
			p.saw(h)
		}
		if sent == len(data) {
			t.Fatal("nothing stops the guest")
		}
	}
	r.d.serving.Lock()
	for c := range r.d.all {
		if n := len(c.in) + c.writing; n != bufferSize {
			t.Errorf("the device keeps %d bytes", n)
		}
	}
	r.d.serving.Unlock()
	// Another connection is not held up.
	other, q := r.connect(6001)
	q.send(opData, 0, []byte("quick"))
	other.want("quick")
	// When it reads, the guest gets credit without a request.
	got := make([]byte, sent)
	_, err := io.ReadFull(c.lines, got)
	check(t, err)
	if !bytes.Equal(got, data[:sent]) {
		t.Error("the program read something else")
	}
	for p.credit() < bufferSize/2 {
		p.expect(opCreditUpdate)
	}
}

// A guest without room gets nothing, and is asked once.
func TestNoCredit(t *testing.T) {
	r := newRig(t, layouts["split"])
	c, p := r.connect(6000)
	p.alloc = 0
	p.send(opCreditUpdate, 0, nil)
	c.say("data")
	p.expect(opCreditRequest)
	r.idle()
	p.send(opCreditUpdate, 0, nil) // still nothing: it has answered, and that was that
	r.idle()
	p.alloc = 3
	p.send(opCreditUpdate, 0, nil)
	if _, b := p.expect(opData); string(b) != "dat" {
		t.Errorf("%q", b)
	}
	p.expect(opCreditRequest)
	p.fwd = 3
	p.send(opCreditUpdate, 0, nil)
	if _, b := p.expect(opData); string(b) != "a" {
		t.Errorf("%q", b)
	}
	// A forward count of bytes that were never sent is no credit.
	p.fwd = 1000
	p.send(opCreditUpdate, 0, nil)
	c.say("x")
	p.expect(opCreditRequest)
	r.idle()
}

func TestHalfClose(t *testing.T) {
	each(t, func(t *testing.T, r *rig) {
		c, p := r.connect(1)
		p.send(opData, 0, []byte("question"))
		p.send(opShutdown, shutSend, nil)
		c.want("question")
		c.end()
		c.say("answer")
		if got := p.read(6); got != "answer" {
			t.Errorf("%q", got)
		}
		check(t, c.CloseWrite())
		for said := uint32(0); said != shutBoth; { // nothing goes either way any more
			h, _ := p.expect(opShutdown)
			said |= h.Flags
		}
		p.send(opReset, 0, nil)
		r.released(0)

		c, p = r.connect(2)
		c.say("question")
		check(t, c.CloseWrite())
		if got := p.read(8); got != "question" {
			t.Errorf("%q", got)
		}
		if h, _ := p.expect(opShutdown); h.Flags != shutSend {
			t.Errorf("flags %d", h.Flags)
		}
		p.send(opData, 0, []byte("answer"))
		c.want("answer")
		p.send(opShutdown, shutBoth, nil)
		p.expect(opReset)
		c.end()
		r.released(0)
	})
}

// A side that shuts down one direction keeps the other.
func TestShutReceive(t *testing.T) {
	r := newRig(t, layouts["split"])
	c, p := r.connect(1)
	p.send(opShutdown, shutReceive, nil)
	for end := time.Now().Add(patience); ; { // soon the program cannot write
		if _, err := io.WriteString(c, "x"); err != nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the program can still write")
		}
	}
	p.send(opData, 0, []byte("still here"))
	c.want("still here")
	p.send(opShutdown, shutBoth, nil)
	p.expect(opReset)
	c.end()

	c, p = r.connect(2)
	check(t, c.CloseRead())
	p.send(opData, 0, []byte("nobody reads this"))
	if h, _ := p.expect(opShutdown); h.Flags != shutReceive {
		t.Errorf("flags %d", h.Flags)
	}
	c.say("still here")
	if got := p.read(10); got != "still here" {
		t.Errorf("%q", got)
	}
	p.send(opData, 0, pattern(bufferSize/2)) // is taken, and takes no credit
	p.expect(opCreditUpdate)
	if p.credit() != bufferSize {
		t.Errorf("credit %d", p.credit())
	}
	check(t, c.Close())
	if h, _ := p.expect(opShutdown); h.Flags != shutBoth {
		t.Errorf("flags %d", h.Flags)
	}
	p.send(opReset, 0, nil)
	r.released(0)
}

// A program that goes away: what it has written still comes, then the end.
func TestHostCloses(t *testing.T) {
	each(t, func(t *testing.T, r *rig) {
		c, p := r.connect(1)
		data := pattern(100000)
		done := make(chan error, 1)
		go func() {
			_, err := c.Write(data)
			done <- err
			_ = c.Close()
		}()
		p.alloc = 1 << 20
		p.send(opCreditUpdate, 0, nil)
		if got := p.read(len(data)); got != string(data) {
			t.Error("other data")
		}
		check(t, <-done)
		for said := uint32(0); said != shutBoth; {
			h, _ := p.expect(opShutdown)
			said |= h.Flags
		}
		p.send(opReset, 0, nil)
		r.released(0)
		r.idle()
	})
}

// A guest that does not confirm the end, or does not answer at all, gets RST.
func TestNoAnswer(t *testing.T) {
	r := newRig(t, layouts["split"])
	r.d.serving.Lock()
	r.d.answerTime = 50 * time.Millisecond
	r.d.serving.Unlock()
	c := dial(t, r.path)
	c.say("CONNECT 80\n")
	h, _ := r.recv()
	c.end()
	p := &peer{r: r, host: h.SrcPort, guest: 80}
	p.expect(opReset)
	p.send(opResponse, 0, nil) // too late
	p.expect(opReset)

	l := r.listen(53)
	c, p = r.request(l, 1, 53)
	check(t, c.Close())
	for said := uint32(0); said != shutBoth; {
		h, _ := p.expect(opShutdown)
		said |= h.Flags
	}
	p.expect(opReset)
	r.released(0)

	// One that takes no packets was not asked, and needs no answer.
	bare := newBareRig(t, layouts["split"])
	bare.d.serving.Lock()
	bare.d.answerTime = 50 * time.Millisecond
	bare.d.serving.Unlock()
	c = dial(t, bare.path)
	c.say("CONNECT 80\n")
	c.end()
	bare.d.serving.Lock()
	if n := len(bare.d.resets); n != 0 {
		t.Errorf("%d resets", n)
	}
	bare.d.serving.Unlock()
}

// The guest's close is confirmed at once, and what it has sent is not lost.
func TestGuestCloses(t *testing.T) {
	each(t, func(t *testing.T, r *rig) {
		c, p := r.request(r.listen(52), 1025, 52)
		check(t, c.SetReadBuffer(4096))
		data := pattern(bufferSize)
		p.send(opData, 0, data)
		p.send(opShutdown, shutBoth, nil)
		for {
			h, _ := r.recv()
			p.saw(h)
			if h.Op == opReset {
				break
			}
		}
		r.gone(0)
		c.want(string(data))
		c.end()
		r.released(0)
	})
}

// Aborted by the guest, nothing more comes.
func TestGuestResets(t *testing.T) {
	r := newRig(t, layouts["split"])
	c, p := r.connect(1)
	p.send(opReset, 0, nil)
	c.end()
	r.released(0)
	r.idle()
}

func TestDriverResets(t *testing.T) {
	each(t, func(t *testing.T, r *rig) {
		c, p := r.connect(1)
		p.send(opData, 0, []byte("last words"))
		waiting := dial(t, r.path)
		waiting.say("CONNECT 2\n")
		r.recv()
		r.d.Reset()
		c.want("last words")
		c.end()
		waiting.end()
		r.released(0)
		r.d.Reset() // on a device that is not active
	})
}

func TestPauseInStream(t *testing.T) {
	each(t, func(t *testing.T, r *rig) {
		c, p := r.connect(1)
		p.alloc = 1 << 20
		p.send(opCreditUpdate, 0, nil)
		data := pattern(300000)
		go func() { _, _ = c.Write(data) }() // what fails is missing below
		first := p.read(50000)
		r.save()
		before := r.mem.Snapshot()
		other := dial(t, r.path)
		other.say("CONNECT 2\n")
		r.submit(p.packet(opData, 0, []byte("later")), []byte("later"))
		time.Sleep(20 * time.Millisecond) // a device that is not quiet writes by now
		if !bytes.Equal(before[:r.txGPA()-base], r.mem.Snapshot()[:r.txGPA()-base]) {
			// The transmit ring is the driver's; look at what the device writes.
			for _, q := range []int{receiveQueue, eventQueue} {
				s := r.drivers[q].State()
				from, to := s.Device-base, s.Device-base+mempage.Size
				if !bytes.Equal(before[from:to], r.mem.Snapshot()[from:to]) {
					t.Errorf("queue %d was used while the device was paused", q)
				}
			}
		}
		check(t, r.d.Resume())
		for _, q := range r.queues {
			q.Signal()
		}
		rest := []byte(first)
		for len(rest) < len(data) {
			h, payload := r.recv()
			if h.DstPort == 2 {
				continue // the other's request
			}
			p.saw(h)
			rest = append(rest, payload...)
			p.fwd += h.Len
		}
		if !bytes.Equal(rest, data) {
			t.Error("other data")
		}
		c.want("later")
	})
}

// A guest may hold more connections than there is room for; the rest is
// refused, and when some end others may come.
func TestLimit(t *testing.T) {
	r := newRig(t, layouts["split"])
	l := r.listen(52)
	var conns []net.Conn
	for i := range uint32(maxConnections) {
		c, _ := r.request(l, 1000+i, 52)
		conns = append(conns, c)
	}
	p := &peer{r: r, host: 52, guest: 1}
	p.send(opRequest, 0, nil)
	p.expect(opReset)
	c := dial(t, r.path)
	c.end()
	check(t, conns[0].Close())
	first := &peer{r: r, host: 52, guest: 1000}
	for said := uint32(0); said != shutBoth; {
		h, _ := first.expect(opShutdown)
		said |= h.Flags
	}
	first.send(opReset, 0, nil)
	r.released(maxConnections - 1)
	r.request(l, 1, 52)
}

var _ virtio.Notifier = (*rig)(nil)
