package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/govmm/govmm/internal/boundedlog"
	"github.com/govmm/govmm/mempage"
)

// bubble is a receiver in a bubble of synctest, whose peers the test plays.
type bubble struct {
	t      *testing.T
	net    *slowNet
	recv   *Receiver
	target *toyTarget // of the last session
	runs   *whoRuns
	lines  chan string
	build  func() error // called by Build, if set
	opened []*conn      // by connect, to be closed at the end
}

// inBubble runs a test with a receiver.
func inBubble(t *testing.T, f func(*bubble)) {
	synctest.Test(t, func(t *testing.T) {
		b := &bubble{t: t, net: newSlowNet(1e9, 64<<10), lines: make(chan string, 4096), runs: &whoRuns{t: t, who: map[string]bool{}}}
		b.recv = NewReceiver(buildFunc(func(_ context.Context, config []byte) (Target, error) {
			if b.build != nil {
				if err := b.build(); err != nil {
					return nil, err
				}
			}
			b.target = &toyTarget{heapTarget: heapTarget{t: t, mem: [2][]byte{make([]byte, 70*mempage.Size), make([]byte, 66*mempage.Size)}}, runs: b.runs}
			return b.target, nil
		}), newLineLog(b.lines))
		ctx, cancel := context.WithCancel(context.Background())
		var served sync.WaitGroup
		served.Go(func() { _ = b.recv.Serve(ctx, b.net) })
		f(b)
		for _, c := range b.opened {
			c.Close()
		}
		cancel()
		served.Wait()
		b.net.carriers.Wait()
	})
}

func (b *bubble) dial() net.Conn {
	b.t.Helper()
	c, err := b.net.Dial(context.Background(), "")
	if err != nil {
		b.t.Fatal(err)
	}
	return c
}

func (b *bubble) write(c net.Conn, s *stream) {
	_, _ = c.Write(s.Bytes()) // it may have been closed
}

// read returns the next frame that is no ALIVE.
func (b *bubble) read(c net.Conn) (h header, err error) {
	for {
		var buf [headerSize]byte
		if _, err := io.ReadFull(c, buf[:]); err != nil {
			return h, err
		}
		h = decodeHeader(buf[:])
		if _, err := io.CopyN(io.Discard, c, int64(h.length)); err != nil || h.typ != frameAlive {
			return h, err
		}
	}
}

// expect reads a frame of a type.
func (b *bubble) expect(c net.Conn, want frameType) {
	b.t.Helper()
	if h, err := b.read(c); err != nil || h.typ != want {
		b.t.Fatalf("%v, %v instead of %v", h.typ, err, want)
	}
}

// begin opens a session with a number of its own, and one data channel, up to READY.
func (b *bubble) begin(id byte) (control, data net.Conn) {
	b.t.Helper()
	control = b.dial()
	h := newHello(purposeMigrate, sessionID{id})
	h.dataChannels = 1
	b.write(control, new(stream).hello(h).config("config"))
	b.expect(control, frameHelloOK)
	data = b.dial()
	b.write(data, new(stream).hello(dataHello(id, 1)))
	b.expect(control, frameReady)
	return control, data
}

// prepare goes on to PREPARED.
func (b *bubble) prepare(id byte) (control, data net.Conn) {
	b.t.Helper()
	control, data = b.begin(id)
	b.write(data, new(stream).frame(round(0, flagLast), nil))
	b.write(control, new(stream).frame(header{typ: frameState}, []byte("state")))
	b.expect(control, framePrepared)
	return control, data
}

// ask asks for the verdict on a session.
func (b *bubble) ask(id byte) string {
	b.t.Helper()
	m := &Migration{peer: newDialer("", Options{Dial: b.net.Dial}.withDefaults()), opt: Options{}.withDefaults(), session: sessionID{id}}
	v, err := m.ask(context.Background())
	if err != nil {
		b.t.Errorf("ask: %v", err)
	}
	return v
}

// migrates expects that a migration completes.
func (b *bubble) migrates() {
	b.t.Helper()
	if _, err := New(newToySource(b.t, b.runs), "", Options{Dial: b.net.Dial}).Run(context.Background()); err != nil {
		b.t.Error(err)
		return
	}
	<-b.recv.Arrived()
}

// drip writes s a byte at a time, again and again if it ends, until the connection ends.
func drip(c net.Conn, every time.Duration, s []byte) {
	for i := 0; ; i = (i + 1) % len(s) {
		if _, err := c.Write(s[i : i+1]); err != nil {
			return
		}
		time.Sleep(every)
	}
}

// Connections that say nothing, or a byte now and then, keep nobody out: queries are
// answered and migrations taken. They are closed after 10 s, and the log has a line for
// all of a kind.
func TestIdleConnectionsKeepNobodyOut(t *testing.T) {
	for _, n := range []int{34, 40, 1000} {
		for _, every := range []time.Duration{0, time.Second} {
			t.Run(fmt.Sprintf("%d, a byte every %v", n, every), func(t *testing.T) {
				inBubble(t, func(b *bubble) {
					var all sync.WaitGroup
					for range n {
						c := b.dial()
						all.Go(func() {
							defer c.Close()
							if every > 0 {
								hello := newHello(purposeQuery, sessionID{1}).encode()
								all.Go(func() { drip(c, every, hello[:]) })
							}
							_, _ = io.Copy(io.Discard, c) // until it is closed there
						})
					}
					if v := b.ask(7); v != verdictUnknown {
						t.Errorf("verdict %q", v)
					}
					b.migrates()
					began := time.Now()
					all.Wait()
					if d := time.Since(began); d > 11*time.Second {
						t.Errorf("they were there for %v more", d)
					}
					boundedlog.Tell(b.recv.log)
					synctest.Wait()
					lines := drained(b.lines)
					if len(lines) > 5 {
						t.Errorf("%d lines: %q", len(lines), lines)
					}
					if all := strings.Join(lines, "\n"); n < maxNewcomers && !strings.Contains(all, fmt.Sprintf("more=%d", n-1)) {
						t.Errorf("no count of %d: %s", n-1, all)
					}
				})
			})
		}
	}
}

func drained(lines chan string) (all []string) {
	for {
		select {
		case l := <-lines:
			all = append(all, l)
		default:
			return all
		}
	}
}

// A source that holds the one place for a migration and does not use it loses it, however
// much it says that it lives.
func TestThePlaceIsForThoseWhoUseIt(t *testing.T) {
	alive := new(stream).frame(header{typ: frameAlive}, nil).Bytes()
	config := new(stream).config(strings.Repeat("x", 1<<20)).Bytes()
	pages := new(stream).frame(header{typ: framePages, count: 1}, onePage('x')).Bytes()
	state := new(stream).frame(header{typ: frameState}, make([]byte, 1<<20)).Bytes()
	hello := func(b *bubble) (control, data net.Conn) {
		control = b.dial()
		b.write(control, new(stream).hello(goodHello()))
		b.expect(control, frameHelloOK)
		return control, nil
	}
	ready := func(b *bubble) (control, data net.Conn) { return b.begin(1) }
	prepared := func(b *bubble) (control, data net.Conn) { return b.prepare(1) }
	for _, c := range []struct {
		name    string
		open    func(*bubble) (control, data net.Conn)
		control []byte // dripped by control
		data    []byte
		every   time.Duration
		alive   bool // ALIVE in between
		within  time.Duration
	}{
		{"nothing", hello, nil, nil, 0, false, 15 * time.Second},
		{"ALIVE before CONFIG", hello, nil, nil, 0, true, 11 * time.Minute},
		{"ALIVE, dripped", hello, alive, nil, 7 * time.Second, false, 2 * time.Minute},
		{"CONFIG, dripped", hello, config, nil, 7 * time.Second, false, 2 * time.Minute},
		{"CONFIG, at 700 bytes a second", hello, config, nil, time.Second / 700, false, 2 * time.Minute},
		{"nothing after READY", ready, nil, nil, 0, false, 15 * time.Second},
		{"ALIVE after READY", ready, nil, nil, 0, true, 11 * time.Minute},
		{"PAGES, dripped", ready, nil, pages, 7 * time.Second, false, 2 * time.Minute},
		{"PAGES, dripped, and ALIVE", ready, nil, pages[:100], 7 * time.Second, true, 2 * time.Minute},
		{"STATE, dripped", ready, state, nil, 9 * time.Second, false, 2 * time.Minute},
		{"nothing for COMMIT", prepared, nil, nil, 0, false, 15 * time.Second},
		{"ALIVE for COMMIT", prepared, nil, nil, 0, true, 11 * time.Minute},
		{"COMMIT, dripped", prepared, new(stream).frame(header{typ: frameCommit}, make([]byte, 9)).Bytes()[:23], nil, 9 * time.Second, false, 5 * time.Minute},
	} {
		t.Run(c.name, func(t *testing.T) {
			inBubble(t, func(b *bubble) {
				control, data := c.open(b)
				began := time.Now()
				var all sync.WaitGroup
				if c.control != nil {
					all.Go(func() { drip(control, c.every, c.control) })
				}
				if c.data != nil {
					all.Go(func() { drip(data, c.every, c.data) })
				}
				if c.alive {
					all.Go(func() {
						for {
							if _, err := control.Write(alive); err != nil {
								return
							}
							time.Sleep(2 * time.Second)
						}
					})
				}
				b.expect(control, frameFailed)
				if d := time.Since(began); d > c.within {
					t.Errorf("it held the place for %v: %q", d, drained(b.lines))
				}
				control.Close()
				if data != nil {
					data.Close()
				}
				all.Wait()
				b.migrates()
			})
		})
	}
}

// A verdict is remembered, whatever comes after it and was never prepared.
func TestVerdictsOutliveThrowAwaySessions(t *testing.T) {
	inBubble(t, func(b *bubble) {
		control, data := b.prepare(1)
		control.Close()
		data.Close()
		synctest.Wait()
		for range 2000 {
			h := goodHello()
			h.session = sessionID{2}
			s, err := b.recv.begin(context.Background(), h, newConn(byteConn{bytes.NewReader(nil)}))
			if err != nil {
				t.Fatal(err)
			}
			s.settle()
			s.finish()
			b.recv.end(s, false)
			s.close()
		}
		if v := b.ask(1); v != verdictAborted {
			t.Errorf("verdict %q", v)
		}
		if v := b.ask(2); v != verdictUnknown {
			t.Errorf("verdict %q on a session that was never prepared", v)
		}
		if n := len(b.recv.verdicts.order); n != 1 {
			t.Errorf("%d verdicts are kept", n)
		}
		b.migrates()
	})
}

// Verdicts are bounded, and the one of the guest that runs here is kept.
func TestVerdictsAreBounded(t *testing.T) {
	v := verdicts{kept: map[sessionID]keptVerdict{}}
	id := func(i int) sessionID { return sessionID{1, byte(i), byte(i >> 8), byte(i >> 16)} }
	from := identity{7}
	for i := range keptVerdicts + 10 {
		v.keep(id(i), from, false)
	}
	v.keep(sessionID{9}, from, true)
	if len(v.kept) != keptVerdicts || len(v.order) != keptVerdicts {
		t.Errorf("%d verdicts, %d in order", len(v.kept), len(v.order))
	}
	for id, want := range map[sessionID]string{id(10): verdictUnknown, id(11): verdictAborted, {9}: verdictRunning} {
		if got, err := v.of(id, from); got != want || err != nil {
			t.Errorf("%v: %q, %v instead of %q", id, got, err, want)
		}
	}
	if got, err := v.of(sessionID{9}, identity{8}); err == nil {
		t.Errorf("another peer is told %q", got)
	}
}

// While a guest is being started, which may take long, a query gets an answer, and it is
// started once.
func TestAQueryDoesNotWaitForTheStart(t *testing.T) {
	inBubble(t, func(b *bubble) {
		control, data := b.prepare(1)
		starts := 0
		b.target.step = func(step string) error {
			if step == "start" {
				starts++
				time.Sleep(time.Minute)
			}
			return nil
		}
		b.write(control, new(stream).frame(header{typ: frameCommit}, nil))
		synctest.Wait()
		for range 3 {
			began := time.Now()
			if v := b.ask(1); v != verdictPending || time.Since(began) > 6*time.Second {
				t.Errorf("verdict %q after %v", v, time.Since(began))
			}
		}
		time.Sleep(50 * time.Second)
		if v := b.ask(1); v != verdictRunning || starts != 1 {
			t.Errorf("verdict %q, %d starts", v, starts)
		}
		b.expect(control, frameRunning)
		control.Close()
		data.Close()
		<-b.recv.Arrived()
	})
}

// Sessions that have failed leave nothing: neither their configuration, nor the buffers of
// their channels.
func TestFailedSessionsKeepNothing(t *testing.T) {
	h, payload := packedFrame(t, CompressLZ4, 64, 'x')
	r := NewReceiver(buildFunc(func(context.Context, []byte) (Target, error) {
		return &heapTarget{t: t, mem: [2][]byte{make([]byte, 64*MaxChannels*mempage.Size), make([]byte, 66*mempage.Size)}}, nil
	}), nil)
	session := func(i byte) {
		var served sync.WaitGroup
		dial := func(s *stream) net.Conn {
			a, c := net.Pipe()
			served.Go(func() { r.serveConn(context.Background(), c) })
			_, _ = a.Write(s.Bytes())
			return a
		}
		hello := newHello(purposeMigrate, sessionID{i})
		hello.dataChannels = MaxChannels
		control := dial(new(stream).hello(hello))
		go func() { _, _ = io.Copy(io.Discard, control) }()
		_, _ = control.Write(new(stream).config(strings.Repeat("x", 4<<20), featureLZ4).Bytes())
		var data []net.Conn
		for n := range uint16(MaxChannels) {
			data = append(data, dial(new(stream).hello(dataHello(i, n+1))))
		}
		for n, c := range data {
			h.first = uint64(64 * n) // memory of its own
			_, _ = c.Write(new(stream).frame(h, payload).Bytes())
		}
		control.Close()
		served.Wait()
		for _, c := range data {
			c.Close()
		}
	}
	session(1)
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC() // pools take two
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	for i := range byte(8) {
		session(i + 2)
	}
	if after := heap(); after > before+2<<20 {
		t.Errorf("8 failed sessions kept %d KiB", (after-before)>>10)
	}
	runtime.KeepAlive(r)
}

// A receiver on TCP answers a query while more connections than it has places for say
// nothing.
func TestIdleSocketsKeepNobodyOut(t *testing.T) {
	rig := newRigOf(t, patienceOfTests, 70*mempage.Size)
	for range 2 * maxNewcomers {
		c, err := net.Dial("tcp", rig.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	m := New(rig.src, rig.addr, Options{PeerTimeout: patienceOfTests})
	if v, err := (&Migration{peer: m.peer, opt: m.opt, session: sessionID{5}}).ask(t.Context()); err != nil || v != verdictUnknown {
		t.Errorf("%q, %v", v, err)
	}
	if _, err := m.Run(t.Context()); err != nil {
		t.Error(err)
	}
	<-rig.recv.Arrived()
}

// A source that comes while the machine of the last session is still being freed, which
// may take long, hears that the receiver lives.
func TestAReceiverThatFreesAMachineLives(t *testing.T) {
	inBubble(t, func(b *bubble) {
		control, data := b.begin(1)
		b.target.step = func(step string) error {
			if step == "discard" {
				time.Sleep(50 * time.Second)
			}
			return nil
		}
		control.Close()
		data.Close()
		time.Sleep(time.Second)
		b.migrates()
	})
}

// A probe of a slow link sends little, and measures it.
func TestProbeOfASlowLink(t *testing.T) {
	for _, rate := range []int{100e3 / 8, 1e6, 50e6} {
		synctest.Test(t, func(t *testing.T) {
			n := newSlowNet(rate, 4<<20)
			recv := NewReceiver(buildFunc(func(context.Context, []byte) (Target, error) { return nil, nil }), nil)
			ctx, cancel := context.WithCancel(context.Background())
			var served sync.WaitGroup
			served.Go(func() { _ = recv.Serve(ctx, n) })
			speed, err := probeLinks(context.Background(), newDialer("", Options{Dial: n.Dial}.withDefaults()), 2)
			if err != nil || speed.bandwidth < 0.8*float64(rate) || speed.bandwidth > 1.2*float64(rate) {
				t.Errorf("%d bytes a second: measured %v, %v", rate, speed.bandwidth, err)
			}
			cancel()
			served.Wait()
			n.carriers.Wait()
		})
	}
}

// A migration that has failed, and is kept for its result, keeps no more than that.
func TestAFailedMigrationKeepsNothing(t *testing.T) {
	rig := newRigOf(t, patienceOfTests, 70*mempage.Size)
	rig.eachStep(func(step string) error {
		if step == "load" {
			return errors.New("not today")
		}
		return nil
	})
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC() // pools take two
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	var kept []*Migration
	for range 3 {
		m := New(rig.src, rig.addr, Options{PeerTimeout: patienceOfTests, Channels: 4, Compression: CompressZstd})
		if _, err := m.Run(t.Context()); err == nil {
			t.Fatal("it completed")
		}
		kept = append(kept, m)
	}
	for deadline := time.Now().Add(patienceOfTests); heap() > before+2<<20; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) { // the connections have endGrace
			t.Fatalf("3 failed migrations kept %d KiB", (heap()-before)>>10)
		}
	}
	runtime.KeepAlive(kept)
}

type sizedCopy struct {
	DiskCopy
	size uint64
}

func (c sizedCopy) Size() uint64 { return c.size }

// A receiver knows how far a pass over memory or disks is.
func TestPassing(t *testing.T) {
	s := &session{slots: []Slot{{Pages: 10}, {GPA: 1 << 32, Pages: 30}}, copies: []DiskCopy{sizedCopy{size: 2*BlockSize - 512}, sizedCopy{size: 2 * BlockSize}}}
	check := func(what string, passed, all uint64) {
		t.Helper()
		if w, p, a := s.passing(); w != what || p != passed || a != all {
			t.Errorf("%q, %d of %d; expected %q, %d of %d", w, p, a, what, passed, all)
		}
	}
	check("", 0, 0)
	s.pass(true, 0, 1)
	check("disks", BlockSize, 4*BlockSize-512)
	s.pass(true, 1, 2)
	check("disks", 4*BlockSize-512, 4*BlockSize-512)
	s.pass(false, 0, 5)
	check("memory", 5*mempage.Size, 40*mempage.Size)
	s.pass(false, 1, 30)
	check("memory", 40*mempage.Size, 40*mempage.Size)
	s.pass(false, 0, 1)
	check("memory", mempage.Size, 40*mempage.Size)
}
