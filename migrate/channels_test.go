package migrate

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/boundedlog"
	"github.com/govmm/govmm/mempage"
)

// pipeSession is a destination whose source is the test, which writes every byte, over
// connections without buffers: what was written has been read.
type pipeSession struct {
	t       *testing.T
	recv    *Receiver
	target  *heapTarget
	control net.Conn
	data    []net.Conn
	served  sync.WaitGroup
	lines   chan string
}

func newPipeSession(t *testing.T) *pipeSession {
	p := &pipeSession{t: t, lines: make(chan string, 16),
		target: &heapTarget{t: t, mem: [2][]byte{make([]byte, 70*mempage.Size), make([]byte, 66*mempage.Size)}}}
	p.recv = NewReceiver(buildFunc(func(context.Context, []byte) (Target, error) { return p.target, nil }),
		slog.New(lineHandler{slog.DiscardHandler, p.lines}))
	p.recv.timeout = 5 * time.Second
	t.Cleanup(func() {
		for _, c := range append(p.data, p.control) {
			if c != nil {
				c.Close()
			}
		}
		p.served.Wait()
	})
	return p
}

func (p *pipeSession) dial(h hello) net.Conn {
	a, b := net.Pipe()
	p.served.Go(func() { p.recv.serveConn(context.Background(), b) })
	_ = a.SetDeadline(time.Now().Add(patienceOfTests))
	p.write(a, new(stream).hello(h))
	return a
}

const patienceOfTests = 20 * time.Second

func (p *pipeSession) write(c net.Conn, s *stream) {
	p.t.Helper()
	if _, err := c.Write(s.Bytes()); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pipeSession) read(c net.Conn, want frameType) header {
	p.t.Helper()
	var b [headerSize]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		p.t.Fatalf("waiting for %v: %v", want, err)
	}
	h := decodeHeader(b[:])
	if h.typ == frameAlive && want != frameAlive {
		return p.read(c, want)
	}
	payload := make([]byte, h.length)
	if _, err := io.ReadFull(c, payload); err != nil || h.typ != want {
		p.t.Fatalf("%v %q (%v) instead of %v", h.typ, payload, err, want)
	}
	return h
}

func dataHello(session byte, channel uint16) hello {
	h := newHello(purposeData, sessionID{session})
	h.channel = channel
	return h
}

// open makes the control connection, which asks for n data channels, and opens them if
// join.
func (p *pipeSession) open(n uint16, join bool, features ...string) {
	h := newHello(purposeMigrate, sessionID{1})
	h.dataChannels = n
	p.control = p.dial(h)
	p.read(p.control, frameHelloOK)
	p.write(p.control, new(stream).config("config", features...))
	if join {
		for i := range n {
			p.data = append(p.data, p.dial(dataHello(1, i+1)))
		}
		p.read(p.control, frameReady)
	}
}

func onePage(fill byte) []byte {
	b := pagesPayload(1, 1, 0)
	return append(b[:16], bytes.Repeat([]byte{fill}, mempage.Size)...)
}

func round(n uint64, flags uint8) header { return header{typ: frameRound, first: n, flags: flags} }

// A page that is sent again lands after its older content, although that arrives late by
// another channel. Without the barrier the old content would stay.
func TestAPageSentTwiceLandsInOrder(t *testing.T) {
	p := newPipeSession(t)
	p.open(2, true)
	ahead := make(chan error, 1)
	go func() {
		s := new(stream).frame(round(0, 0), nil).frame(header{typ: framePages, count: 1}, onePage('n')).frame(round(1, flagLast), nil)
		_, err := p.data[1].Write(s.Bytes())
		ahead <- err
	}()
	select {
	case err := <-ahead:
		t.Fatalf("channel 2 was read past a round that channel 1 had not ended (%v)", err)
	case <-time.After(50 * time.Millisecond): // as far as it comes
	}
	p.write(p.data[0], new(stream).frame(header{typ: framePages, count: 1}, onePage('o')).frame(round(0, 0), nil))
	if h := p.read(p.control, frameRound); h.first != 0 {
		t.Errorf("round %d is confirmed", h.first)
	}
	p.write(p.data[0], new(stream).frame(round(1, flagLast), nil))
	if err := <-ahead; err != nil {
		t.Fatal(err)
	}
	p.write(p.control, new(stream).frame(header{typ: frameState}, []byte("state")))
	p.read(p.control, framePrepared)
	if got := p.target.mem[0][0]; got != 'n' {
		t.Errorf("the page has content %q, the older one", got)
	}
	p.write(p.control, new(stream).frame(header{typ: frameCommit}, nil))
	p.read(p.control, frameRunning)
	<-p.recv.Arrived()
}

// The state comes first, by control. It is not loaded, and nothing runs, before the last
// frame of every channel has landed. What follows that frame is not read.
func TestStateWaitsForEveryChannel(t *testing.T) {
	p := newPipeSession(t)
	p.open(2, true)
	p.write(p.data[1], new(stream).frame(round(0, flagLast), nil))
	p.write(p.control, new(stream).frame(header{typ: frameState}, []byte("state")))
	_ = p.control.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	for {
		var b [headerSize]byte
		if _, err := p.control.Read(b[:]); errors.Is(err, os.ErrDeadlineExceeded) {
			break
		} else if h := decodeHeader(b[:]); err != nil || h.typ != frameAlive {
			t.Fatalf("%v, %v before channel 1 ended", h.typ, err)
		}
	}
	_ = p.control.SetReadDeadline(time.Now().Add(patienceOfTests))
	p.write(p.data[0], new(stream).frame(header{typ: framePages, count: 1}, onePage('x')).frame(round(0, flagLast), nil))
	p.read(p.control, framePrepared)
	_ = p.data[0].SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := p.data[0].Write(new(stream).frame(header{typ: framePages, count: 1}, onePage('y')).Bytes()); err == nil {
		t.Error("pages were read after the last ROUND")
	}
	if p.target.mem[0][0] != 'x' {
		t.Error("the page did not land")
	}
}

// Rounds without a page end like all others: one that is to be confirmed is confirmed
// once; a quiet one is not, and delays nothing.
func TestRoundsWithoutPages(t *testing.T) {
	p := newPipeSession(t)
	p.open(2, true)
	for n := uint64(0); n < 6; n += 2 {
		for _, c := range p.data {
			p.write(c, new(stream).frame(round(n, 0), nil))
		}
		if h := p.read(p.control, frameRound); h.first != n {
			t.Errorf("round %d is confirmed instead of %d", h.first, n)
		}
		for _, c := range p.data {
			p.write(c, new(stream).frame(round(n+1, flagQuiet), nil))
		}
	}
	// If a quiet one were confirmed, that would come before PREPARED.
	for _, c := range p.data {
		p.write(c, new(stream).frame(round(6, flagLast), nil))
	}
	p.write(p.control, new(stream).frame(header{typ: frameState}, []byte("state")))
	p.read(p.control, framePrepared)
}

// Connections that do not belong to the session are refused, and the session goes on.
func TestDataChannelsThatDoNotBelong(t *testing.T) {
	p := newPipeSession(t)
	p.open(2, false)
	p.data = append(p.data, p.dial(dataHello(1, 1)))
	for joined := false; !joined; time.Sleep(time.Millisecond) { // nothing is said to those who are let in
		p.recv.sessionMu.Lock()
		s := p.recv.active
		p.recv.sessionMu.Unlock()
		s.dataMu.Lock()
		joined = s.inlets[0] != nil
		s.dataMu.Unlock()
	}
	for _, c := range []struct {
		name string
		h    hello
		why  string
	}{
		{"another session", dataHello(2, 2), "not under way"},
		{"a number twice", dataHello(1, 1), "connected already"},
		{"number 0", dataHello(1, 0), "data channel 0"},
		{"too many", dataHello(1, 3), "the session has 2"},
		{"version 2", hello{version: 2, oldest: 1, purpose: purposeData, channel: 2, session: sessionID{1}}, "versions 1 to 2, this host version 3"},
		{"a second migration", newHello(purposeMigrate, sessionID{9}), "under way"},
	} {
		a := p.dial(c.h)
		p.read(a, frameRefused)
		a.Close()
		if line := <-p.lines; !strings.Contains(line, c.why) {
			t.Errorf("%s: refused since %q, want %q", c.name, line, c.why)
		}
		boundedlog.Tell(p.recv.log) // the next one is no repetition
	}
	other, b := net.Pipe()
	p.served.Go(func() { p.recv.serveConn(context.Background(), b) })
	_, _ = other.Write([]byte("GET / HTTP/1.1\r\nHost: somewhere.example\r\nAccept: text/html\r\nX: 0123456789\r\n\r\n")[:helloSize])
	<-p.lines
	boundedlog.Tell(p.recv.log)
	other.Close()

	p.data = append(p.data, p.dial(dataHello(1, 2)))
	p.read(p.control, frameReady)
	late := p.dial(dataHello(1, 2))
	p.read(late, frameRefused)
	<-p.lines
	boundedlog.Tell(p.recv.log)
	late.Close()
	last := new(stream).frame(round(0, flagLast), nil)
	p.write(p.data[0], last)
	p.write(p.data[1], last)
	p.write(p.control, new(stream).frame(header{typ: frameState}, []byte("state")))
	p.read(p.control, framePrepared)
	p.write(p.control, new(stream).frame(header{typ: frameCommit}, nil))
	p.read(p.control, frameRunning)
	<-p.recv.Arrived()
	after := p.dial(dataHello(1, 1))
	p.read(after, frameRefused)
	<-p.lines // of the arrival, or the refusal
	after.Close()
}

// A session whose channels do not come ends, and another can begin.
func TestChannelsThatDoNotCome(t *testing.T) {
	p := newPipeSession(t)
	p.recv.timeout = 50 * time.Millisecond
	p.open(2, false)
	p.data = append(p.data, p.dial(dataHello(1, 2)))
	p.read(p.control, frameFailed)
	p.control.Close()
	if line := <-p.lines; !strings.Contains(line, "1 of 2 data channels did not come") {
		t.Error(line)
	}
}

// One channel is silent while the others and control wait for it: the peer is dead when
// nothing arrives by any of them.
func TestSilentChannelEndsTheSession(t *testing.T) {
	p := newPipeSession(t)
	p.recv.timeout = 50 * time.Millisecond
	p.open(3, true)
	p.write(p.data[0], new(stream).frame(round(0, 0), nil))
	p.write(p.data[2], new(stream).frame(round(0, 0), nil))
	p.read(p.control, frameFailed)
	p.control.Close()
	if line := <-p.lines; !strings.Contains(line, "silent") {
		t.Error(line)
	}
	if p.target.started {
		t.Error("it runs")
	}
}

// An error of one channel ends the session at once, with the channel's number.
func TestHostileChannels(t *testing.T) {
	zip := func(plain []byte) []byte { // LZ4 of any bytes: literals
		b := []byte{0xf0}
		n := len(plain) - 15
		for ; n >= 255; n -= 255 {
			b = append(b, 255)
		}
		return append(append(b, byte(n)), plain...)
	}
	meta := func(pages uint64) []byte {
		b := binary.LittleEndian.AppendUint64(nil, pages)
		return binary.LittleEndian.AppendUint64(b, 0)
	}
	zstdBomb := []byte{0x28, 0xb5, 0x2f, 0xfd, 0xa4, 0xff, 0xff, 0xff, 0x7f} // a frame of 2 GiB, it says
	for name, s := range map[string]*stream{
		"STATE on a data channel":  new(stream).frame(header{typ: frameState}, []byte("state")),
		"COMMIT on a data channel": new(stream).frame(header{typ: frameCommit}, nil),
		"unknown flag of ROUND":    new(stream).frame(round(0, 4), nil),
		"ROUND with a payload":     new(stream).frame(round(0, 0), []byte{1}),
		"span out of memory":       new(stream).frame(header{typ: framePages, slot: 1, first: 64, count: 3}, pagesPayload(3, 1, 0)),
		"unknown codec":            new(stream).frame(header{typ: framePacked, flags: 9, count: 1}, append(meta(1), 1, 2, 3)),
		"codec not named":          new(stream).frame(header{typ: framePacked, flags: codecZstd, count: 1}, append(meta(1), 1, 2, 3)),
		"packed to nothing":        new(stream).frame(header{typ: framePacked, flags: codecLZ4, count: 1}, meta(1)),
		"packed to more":           new(stream).frame(header{typ: framePacked, flags: codecLZ4, count: 1}, append(meta(1), make([]byte, mempage.Size)...)),
		"less than announced":      new(stream).frame(header{typ: framePacked, flags: codecLZ4, count: 2}, append(meta(3), zip(make([]byte, mempage.Size))...)),
		"more than announced":      new(stream).frame(header{typ: framePacked, flags: codecLZ4, count: 1}, append(meta(1), 0x1f, 0, 1, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0)),
		"corrupt":                  new(stream).frame(header{typ: framePacked, flags: codecLZ4, count: 1}, append(meta(1), 0xff, 0xff)),
		"packed without pages":     new(stream).frame(header{typ: framePacked, flags: codecLZ4, count: 1}, append(meta(0), 1)),
		"zstd of 2 GiB":            new(stream).frame(header{typ: framePacked, flags: codecZstd, count: 1}, append(meta(1), zstdBomb...)),
	} {
		t.Run(name, func(t *testing.T) {
			p := newPipeSession(t)
			features := []string{featureLZ4}
			if strings.HasPrefix(name, "zstd") {
				features = append(features, featureZstd)
			}
			p.open(2, true, features...)
			_, _ = p.data[1].Write(s.Bytes()) // it may be cut short
			p.read(p.control, frameFailed)
			p.control.Close()
			if line := <-p.lines; !strings.Contains(line, "data channel 2: ") || !strings.Contains(line, ErrProtocol.Error()) {
				t.Errorf("reason %q", line)
			}
			p.served.Wait()
			if p.target.started || !p.target.discarded {
				t.Errorf("started: %v, discarded: %v", p.target.started, p.target.discarded)
			}
		})
	}
}

// gate delays a data channel until enough has passed by the others.
type gate struct {
	ln    net.Listener
	to    string
	slow  uint16
	after int64
	mu    sync.Mutex // guards passed
	past  int64
	open  chan struct{}
	stop  chan struct{}
	wg    sync.WaitGroup
}

func newGate(t *testing.T, to string, slow uint16, after int64) *gate {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{ln: ln, to: to, slow: slow, after: after, open: make(chan struct{}), stop: make(chan struct{})}
	g.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			g.wg.Go(func() { g.serve(c) })
		}
	})
	t.Cleanup(func() {
		close(g.stop)
		ln.Close()
		g.wg.Wait()
	})
	return g
}

func (g *gate) serve(a net.Conn) {
	defer a.Close()
	b, err := net.Dial("tcp", g.to)
	if err != nil {
		return
	}
	defer b.Close()
	hello := make([]byte, helloSize)
	if _, err := io.ReadFull(a, hello); err != nil {
		return
	}
	_, _ = b.Write(hello)
	var back sync.WaitGroup
	back.Go(func() {
		_, _ = io.Copy(a, b)
		a.Close()
	})
	defer back.Wait()
	defer b.Close()
	if binary.LittleEndian.Uint16(hello[14:]) == g.slow {
		select {
		case <-g.open:
		case <-g.stop:
			return
		}
	}
	buf := make([]byte, 256<<10)
	for {
		n, err := a.Read(buf)
		if err != nil {
			return
		}
		if _, err := b.Write(buf[:n]); err != nil {
			return
		}
		g.mu.Lock()
		if g.past += int64(n); g.past >= g.after {
			select {
			case <-g.open:
			default:
				close(g.open)
			}
		}
		g.mu.Unlock()
	}
}

// One channel takes nothing until most of memory has passed by the other, which does not
// wait for it.
func TestASlowChannelHoldsUpNoOther(t *testing.T) {
	const size = 96 << 20
	rig := newRigOf(t, patienceOfTests, size)
	rig.src.mem[0] = bytes.Repeat([]byte{7}, size)
	opt := testOptions()
	opt.PeerTimeout = patienceOfTests
	opt.Channels = 2
	// What the kernel buffers of a connection that nobody reads, and the span
	// under way, is well below 32 MiB.
	g := newGate(t, rig.addr, 1, 64<<20)
	m := New(rig.src, g.ln.Addr().String(), opt)
	if _, err := m.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	<-rig.recv.Arrived()
	if !bytes.Equal(rig.src.mem[0], rig.target().mem[0]) {
		t.Error("memory differs")
	}
	r := m.Result()
	if r.Channels != 2 || len(r.ChannelBytes) != 2 || r.ChannelBytes[0]+r.ChannelBytes[1] < size || r.BytesSent < size {
		t.Errorf("result %+v", r)
	}
}

// Both kinds of compression move the same memory, and say what they saved.
func TestCompressionOverChannels(t *testing.T) {
	for _, c := range []Compression{CompressNone, CompressZstd, CompressLZ4} {
		t.Run(string(c), func(t *testing.T) {
			rig := newRigOf(t, patienceOfTests, 70*mempage.Size)
			opt := testOptions()
			opt.PeerTimeout, opt.Channels, opt.Compression, opt.VerifyPages = patienceOfTests, 3, c, true
			m := New(rig.src, rig.addr, opt)
			if _, err := m.Run(context.Background()); err != nil {
				t.Fatal(err)
			}
			<-rig.recv.Arrived()
			for i := range rig.src.mem {
				if !bytes.Equal(rig.src.mem[i], rig.target().mem[i]) {
					t.Errorf("slot %d differs", i)
				}
			}
			r := m.Result()
			if r.Compression != string(c) || (c == CompressNone) != (r.CompressionRatio == 1) || c != CompressNone && r.CompressionRatio < 5 {
				t.Errorf("compression %v, ratio %v", r.Compression, r.CompressionRatio)
			}
		})
	}
}
