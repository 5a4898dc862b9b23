package migrate

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/govmm/govmm/internal/testcert"
	"github.com/govmm/govmm/mempage"
)

// byteConn is a connection whose peer has sent all of in and reads nothing.
type byteConn struct{ in *bytes.Reader }

func (c byteConn) Read(p []byte) (int, error)       { return c.in.Read(p) }
func (byteConn) Write(p []byte) (int, error)        { return len(p), nil }
func (byteConn) Close() error                       { return nil }
func (byteConn) LocalAddr() net.Addr                { return &net.TCPAddr{} }
func (byteConn) RemoteAddr() net.Addr               { return &net.TCPAddr{} }
func (byteConn) SetDeadline(time.Time) error        { return nil }
func (byteConn) SetReadDeadline(t time.Time) error  { return nil }
func (byteConn) SetWriteDeadline(t time.Time) error { return nil }

// heapTarget is a destination's machine of two small slots that checks how the engine
// uses it.
type heapTarget struct {
	t         testing.TB
	mem       [2][]byte
	started   bool
	discarded bool
	prepared  []byte
	loaded    []byte
	disks     []DiskCopy
}

func (h *heapTarget) DiskCopies() []DiskCopy { return h.disks }

func (h *heapTarget) Slots() []Slot {
	return []Slot{{GPA: 0, Pages: uint64(len(h.mem[0]) / mempage.Size)}, {GPA: 1 << 32, Pages: uint64(len(h.mem[1]) / mempage.Size)}}
}

func (h *heapTarget) Bytes(slot int, first, n uint64) []byte {
	return h.mem[slot][first*mempage.Size : (first+n)*mempage.Size : (first+n)*mempage.Size]
}

func (h *heapTarget) Populated(slot int, first, n uint64, bm []uint64) error {
	clear(bm)
	for i := range n {
		bm[i/64] |= 1 << (i % 64)
	}
	return nil
}

func (h *heapTarget) Zero(slot int, first, n uint64) error {
	clear(h.Bytes(slot, first, n))
	return nil
}

func (h *heapTarget) Prefault(slot int, first, n uint64) error {
	h.Bytes(slot, first, n) // panics outside
	return nil
}

func (h *heapTarget) CompareStorage(_ context.Context, session [16]byte, b []byte) error {
	if session == (sessionID{}) {
		h.t.Error("the storage is compared without a nonce")
	}
	if string(b) == "other" {
		return errors.New("this is another disk")
	}
	return nil
}

func (h *heapTarget) PrepareState(b []byte) error {
	if string(b) == "worse" {
		return errors.New("this state cannot be read")
	}
	h.prepared = b
	return nil
}

func (h *heapTarget) LoadState(_ context.Context, b []byte) error {
	if !bytes.Equal(b, h.prepared) {
		h.t.Error("loads another state than was prepared")
	}
	if string(b) == "bad" {
		return errors.New("this state cannot be loaded")
	}
	h.loaded = b
	return nil
}

func (h *heapTarget) UnloadState(context.Context) error {
	if h.loaded == nil || h.started {
		h.t.Error("unloads a machine that has no state, or runs")
	}
	if string(h.loaded) == "sticky" {
		return errors.New("this state cannot be unloaded")
	}
	h.prepared, h.loaded = nil, nil
	return nil
}

func (h *heapTarget) Start(_ context.Context, paused bool) error {
	if h.discarded || h.loaded == nil {
		h.t.Error("started a machine that has no state")
	}
	h.started = true
	return nil
}

func (h *heapTarget) Discard() error {
	if h.started {
		h.t.Error("discarded a machine that runs")
	}
	h.discarded = true
	return nil
}

type buildFunc func(context.Context, []byte) (Target, error)

func (f buildFunc) Build(ctx context.Context, config []byte) (Target, error) { return f(ctx, config) }

// stream builds what a source sends.
type stream struct{ bytes.Buffer }

func (s *stream) hello(h hello) *stream {
	b := h.encode()
	s.Write(b[:])
	return s
}

func (s *stream) frame(h header, payload []byte) *stream {
	var b [headerSize]byte
	h.length = uint32(len(payload))
	h.encode(b[:])
	s.Write(b[:])
	s.Write(payload)
	return s
}

func (s *stream) control(t frameType, v any) *stream {
	b, err := cbor.Marshal(v)
	if err != nil {
		panic(err)
	}
	return s.frame(header{typ: t}, b)
}

func pagesPayload(count int, data, zero uint64) []byte {
	words := (count + 63) / 64
	b := make([]byte, 2*words*8)
	binary.LittleEndian.PutUint64(b, data)
	binary.LittleEndian.PutUint64(b[words*8:], zero)
	for i := range count {
		if i < 64 && data>>i&1 != 0 {
			b = append(b, bytes.Repeat([]byte{byte(i + 1)}, mempage.Size)...)
		}
	}
	return b
}

func goodHello() hello {
	h := newHello(purposeMigrate, sessionID{1})
	h.dataChannels = 1
	return h
}

// config is a CONFIG of a migration that uses features.
func (s *stream) config(machine string, features ...string) *stream {
	return s.control(frameConfig, configMsg{Features: features, Machine: []byte(machine)})
}

// state is what a source sends in the stop by its control connection.
func (s *stream) state(b string) *stream {
	return s.frame(header{typ: frameStorage}, []byte("disk")).frame(header{typ: frameState}, []byte(b))
}

func start() *stream { return new(stream).hello(goodHello()).config("config", knownFeatures...) }

// goodStream is a whole, small migration: the bytes of the control connection, and of the
// data channel.
func goodStream() (control, data *stream) {
	data = new(stream).frame(header{typ: framePages, slot: 0, count: 3}, pagesPayload(3, 0b101, 0b010))
	data.frame(round(0, 0), nil)
	data.frame(header{typ: framePages, slot: 1, first: 64, count: 2}, pagesPayload(2, 0b10, 0b01))
	data.frame(round(1, flagLast), nil)
	control = start().state("state")
	return control.frame(header{typ: frameCommit}, nil), data
}

// noPages is a data channel that carries nothing.
func noPages() []byte { return new(stream).frame(round(0, flagLast), nil).Bytes() }

// serveBytes lets a receiver read in as the control connection, and data as its data
// channels after their hellos.
func serveBytes(t testing.TB, in []byte, data ...[]byte) *heapTarget {
	return serveTarget(t, nil, in, data...)
}

// serveTarget is serveBytes for a machine with disks that are copied.
func serveTarget(t testing.TB, disks []DiskCopy, in []byte, data ...[]byte) *heapTarget {
	target := &heapTarget{t: t, mem: [2][]byte{make([]byte, 70*mempage.Size), make([]byte, 66*mempage.Size)}, disks: disks}
	built, ended := make(chan struct{}), make(chan struct{})
	r := NewReceiver(buildFunc(func(_ context.Context, config []byte) (Target, error) {
		if string(config) == "bad" {
			return nil, errors.Join(errors.New("no such CPU"), errors.New("no such memory"))
		}
		close(built)
		return target, nil
	}), nil)
	r.timeout = time.Second
	go func() {
		r.serveConn(context.Background(), byteConn{bytes.NewReader(in)})
		close(ended)
	}()
	made := false
	select {
	case <-built: // the session is there
		made = true
		var channels sync.WaitGroup
		for i, b := range data {
			channels.Go(func() {
				r.serveConn(context.Background(), byteConn{bytes.NewReader(append(new(stream).hello(dataHello(1, uint16(i+1))).Bytes(), b...))})
			})
		}
		channels.Wait()
		<-ended
	case <-ended:
	}
	select {
	case got := <-r.Arrived():
		if got != Target(target) || !target.started {
			t.Error("a machine arrived that was not started")
		}
	default:
		if target.started {
			t.Error("a machine was started and did not arrive")
		}
		if made && !target.discarded {
			t.Error("a machine was neither started nor discarded")
		}
	}
	return target
}

func TestDestinationTakesAGoodStream(t *testing.T) {
	control, data := goodStream()
	target := serveBytes(t, control.Bytes(), data.Bytes())
	if !target.started {
		t.Fatal("the guest was not started")
	}
	if string(target.loaded) != "state" {
		t.Errorf("loaded state %q", target.loaded)
	}
	for page, want := range map[int]byte{0: 1, 1: 0, 2: 3, 3: 0} {
		if got := target.mem[0][page*mempage.Size]; got != want {
			t.Errorf("slot 0 page %d begins with %d, want %d", page, got, want)
		}
	}
	if got := target.mem[1][65*mempage.Size]; got != 2 {
		t.Errorf("slot 1 page 65 begins with %d, want 2", got)
	}
}

// Every proper prefix of a migration is a failure: nothing runs.
func TestDestinationRunsNothingTruncated(t *testing.T) {
	control, data := goodStream()
	whole := control.Bytes()
	for n := range len(whole) {
		if serveBytes(t, whole[:n], data.Bytes()).started {
			t.Fatalf("a guest runs after %d of %d bytes", n, len(whole))
		}
	}
}

func TestDestinationRefusesHostileFrames(t *testing.T) {
	raw := func(s *stream, h header) []byte { // a header whose length is a lie
		var b [headerSize]byte
		h.encode(b[:])
		s.Write(b[:])
		return s.Bytes()
	}
	tail := func(s *stream) []byte {
		return s.state("state").frame(header{typ: frameCommit}, nil).Bytes()
	}
	one := new(stream).frame(header{typ: framePages, count: 1}, pagesPayload(1, 1, 0)).frame(round(0, flagLast), nil).Bytes()
	for name, in := range map[string][]byte{
		"config of 4 GiB":       raw(new(stream).hello(goodHello()), header{typ: frameConfig, length: 1<<32 - 1}),
		"config that is none":   tail(new(stream).hello(goodHello()).frame(header{typ: frameConfig}, []byte("config"))),
		"state of 4 GiB":        raw(start(), header{typ: frameState, length: 1<<32 - 1}),
		"abort of 4 GiB":        raw(start(), header{typ: frameAbort, length: 1<<32 - 1}),
		"pages by control":      tail(start().frame(header{typ: framePages, count: 1}, pagesPayload(1, 1, 0))),
		"round by control":      tail(start().frame(header{typ: frameRound}, nil)),
		"reply as a request":    tail(start().frame(header{typ: frameRunning}, nil)),
		"unknown frame":         tail(start().frame(header{typ: 200}, nil)),
		"storage of 4 GiB":      raw(start(), header{typ: frameStorage, length: 1<<32 - 1}),
		"storage twice":         tail(start().frame(header{typ: frameStorage}, []byte("disk"))),
		"storage not named":     tail(new(stream).hello(goodHello()).config("config")),
		"state before storage":  start().frame(header{typ: frameState}, []byte("state")).frame(header{typ: frameStorage}, nil).frame(header{typ: frameCommit}, nil).Bytes(),
		"no storage":            start().frame(header{typ: frameState}, []byte("state")).frame(header{typ: frameCommit}, nil).Bytes(),
		"other storage":         start().frame(header{typ: frameStorage}, []byte("other")).frame(header{typ: frameState}, []byte("state")).frame(header{typ: frameCommit}, nil).Bytes(),
		"state before config":   tail(new(stream).hello(goodHello())),
		"state refused":         start().state("bad").frame(header{typ: frameCommit}, nil).Bytes(),
		"config refused":        tail(new(stream).hello(goodHello()).config("bad")),
		"unknown feature":       tail(new(stream).hello(goodHello()).config("config", "warp")),
		"commit with a payload": start().state("s").frame(header{typ: frameCommit}, []byte{1}).Bytes(),
		"commit without state":  start().frame(header{typ: frameCommit}, nil).Bytes(),
		"abort":                 start().control(frameAbort, reason{"enough"}).Bytes(),
		"wrong hashes":          tail(start().frame(header{typ: frameHashes, count: 1}, make([]byte, hashSize))),
		"hashes not named":      tail(new(stream).hello(goodHello()).config("config").frame(header{typ: frameHashes, count: 1}, make([]byte, hashSize))),
		"http":                  []byte("GET / HTTP/1.1\r\nHost: somewhere.example\r\nAccept: text/html\r\nX: 0123456789\r\n\r\n"),
	} {
		t.Run(name, func(t *testing.T) {
			if serveBytes(t, in, one).started {
				t.Error("the guest was started")
			}
		})
	}
	for name, in := range map[string][]byte{
		"slot out of range":     new(stream).frame(header{typ: framePages, slot: 2, count: 1}, pagesPayload(1, 1, 0)).Bytes(),
		"first page 2^63":       new(stream).frame(header{typ: framePages, first: 1 << 63, count: 64}, pagesPayload(64, 1, 0)).Bytes(),
		"first page near 2^64":  new(stream).frame(header{typ: framePages, first: 1<<64 - 64, count: 64}, pagesPayload(64, 1, 0)).Bytes(),
		"unaligned first page":  new(stream).frame(header{typ: framePages, first: 1, count: 1}, pagesPayload(1, 1, 0)).Bytes(),
		"span past the end":     new(stream).frame(header{typ: framePages, first: 64, count: 7}, pagesPayload(7, 1, 0)).Bytes(),
		"span of nothing":       new(stream).frame(header{typ: framePages}, nil).Bytes(),
		"span too long":         raw(new(stream), header{typ: framePages, count: maxSpan + 1}),
		"data and zero at once": new(stream).frame(header{typ: framePages, count: 2}, pagesPayload(2, 1, 1)).Bytes(),
		"page beyond its span":  new(stream).frame(header{typ: framePages, count: 2}, pagesPayload(2, 4, 0)).Bytes(),
		"length against bitmap": new(stream).frame(header{typ: framePages, count: 2}, pagesPayload(2, 1, 0)[:mempage.Size]).Bytes(),
		"round with a payload":  new(stream).frame(header{typ: frameRound}, []byte{1}).Bytes(),
		"reply as a request":    new(stream).frame(header{typ: frameRunning}, nil).Bytes(),
		"unknown frame":         new(stream).frame(header{typ: 200}, nil).Bytes(),
	} {
		t.Run("data channel: "+name, func(t *testing.T) {
			if serveBytes(t, tail(start()), append(in, noPages()...)).started {
				t.Error("the guest was started")
			}
		})
	}
	for name, h := range map[string]hello{
		"version 0":         {purpose: purposeMigrate, session: sessionID{1}, dataChannels: 1},
		"version 2":         {version: 2, oldest: 1, purpose: purposeMigrate, session: sessionID{1}, dataChannels: 1},
		"version too new":   {version: 9, oldest: 4, purpose: purposeMigrate, session: sessionID{1}, dataChannels: 1},
		"no session":        newHello(purposeMigrate, sessionID{}),
		"channel of none":   {version: Version, oldest: Version, purpose: purposeMigrate, channel: 1, session: sessionID{1}},
		"data channel zero": newHello(purposeData, sessionID{1}),
		"unknown purpose":   newHello(9, sessionID{1}),
	} {
		t.Run("hello: "+name, func(t *testing.T) {
			if serveBytes(t, tail(new(stream).hello(h).config("config")), noPages()).started {
				t.Error("the guest was started")
			}
		})
	}
	later := goodHello()
	later.version = Version + 1
	if !serveBytes(t, tail(new(stream).hello(later).config("config", knownFeatures...)), noPages()).started {
		t.Error("a later version that speaks this one, too, is refused")
	}
}

// FuzzDestination feeds a destination what a hostile source may send after its
// hello and configuration.
func FuzzDestination(f *testing.F) {
	first := start().Bytes()
	control, _ := goodStream()
	f.Add(control.Bytes()[len(first):])
	f.Add(new(stream).frame(header{typ: frameHashes, count: 2}, make([]byte, 16)).Bytes())
	f.Add(new(stream).control(frameAbort, reason{"x"}).Bytes())
	f.Fuzz(func(t *testing.T, rest []byte) {
		serveBytes(t, append(first[:len(first):len(first)], rest...), noPages())
	})
}

// FuzzHello feeds a destination a whole connection.
func FuzzHello(f *testing.F) {
	control, _ := goodStream()
	f.Add(control.Bytes())
	f.Add(start().frame(header{typ: frameAlive}, nil).frame(header{typ: frameAlive}, []byte{1}).Bytes())
	f.Add(new(stream).hello(newHello(purposeQuery, sessionID{1})).Bytes())
	f.Fuzz(func(t *testing.T, in []byte) { serveBytes(t, in, noPages()) })
}

// FuzzTLSPort feeds a receiver with TLS, and one without, what a stranger may say.
func FuzzTLSPort(f *testing.F) {
	ca := testcert.NewCA(f, "the CA")
	server := ca.Server(ca.Issue(f, "destination"))
	said := &recordingConn{}
	k, err := newCredentials(ca.Client(ca.Issue(f, "source"), "destination"), "")
	if err != nil {
		f.Fatal(err)
	}
	if err := k.handshake(context.Background(), newConn(said)); err == nil {
		f.Fatal("nobody answered")
	}
	f.Add(said.Bytes())
	f.Add(start().Bytes())
	f.Add([]byte{tlsFirstByte})
	f.Fuzz(func(t *testing.T, in []byte) {
		for _, secure := range []bool{true, false} {
			r := NewReceiver(buildFunc(func(context.Context, []byte) (Target, error) {
				if secure {
					t.Error("a machine is built for a stranger")
				}
				return nil, errors.New("none here")
			}), nil)
			r.timeout = time.Second
			if secure {
				if err := r.RequireTLS(server); err != nil {
					t.Fatal(err)
				}
			}
			r.serveConn(context.Background(), byteConn{bytes.NewReader(in)})
		}
	})
}

// recordingConn keeps what is written to it, and ends.
type recordingConn struct {
	byteConn
	bytes.Buffer
}

func (c *recordingConn) Read([]byte) (int, error)    { return 0, io.EOF }
func (c *recordingConn) Write(p []byte) (int, error) { return c.Buffer.Write(p) }

// FuzzReplies feeds a source what a hostile destination may answer.
func FuzzReplies(f *testing.F) {
	s := new(stream).control(frameHelloOK, helloOK{Version: Version, Channels: 1, Alive: 2000, Features: []string{featureReset}})
	s.frame(header{typ: frameReady}, nil).frame(header{typ: frameRound}, nil).control(framePrepared, tookMsg{5, 1})
	f.Add(s.control(frameRunning, tookMsg{Microseconds: 6}).Bytes())
	f.Add(new(stream).frame(header{typ: frameAlive, flags: flagIdle}, nil).frame(header{typ: frameAlive}, []byte{1}).Bytes())
	f.Add(new(stream).control(frameRefused, refused{[]string{"a", "b"}}).Bytes())
	f.Add(new(stream).control(frameFailed, reason{"a"}).Bytes())
	f.Add(new(stream).control(frameVerdict, verdictMsg{verdictRunning}).Bytes())
	f.Fuzz(func(t *testing.T, in []byte) {
		c := newConn(byteConn{bytes.NewReader(in)})
		l := &link{conn: c, pulse: &pulse{control: c}}
		for {
			r, err := l.readReply()
			if err != nil {
				if err.Error() == "" || bytes.ContainsAny([]byte(err.Error()), "\n\r\x1b") {
					t.Errorf("error text %q", err)
				}
				return
			}
			var ok helloOK
			_ = decodeControl(r.typ, r.payload, &ok)
			var v verdictMsg
			_ = decodeControl(r.typ, r.payload, &v)
		}
	})
}

// A header that announces much allocates no memory until the bytes arrive.
func TestPayloadGrowsWithWhatArrives(t *testing.T) {
	c := newConn(byteConn{bytes.NewReader(make([]byte, 10))})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := c.readPayload(header{typ: frameConfig, length: maxConfig}, maxConfig); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("reading 10 of 512 MiB: %v", err)
	}
	runtime.ReadMemStats(&after)
	if grew := after.TotalAlloc - before.TotalAlloc; grew > 32<<20 { // other goroutines' included
		t.Errorf("%d bytes were allocated for 10", grew)
	}
}

func TestRuns(t *testing.T) {
	words := []uint64{0b1101, 0, 1<<63 | 1<<62, 1, ^uint64(0), 1 << 63}
	var got [][2]int
	forRuns(words, func(s, e int) { got = append(got, [2]int{s, e}) })
	want := [][2]int{{0, 1}, {2, 4}, {190, 193}, {256, 320}, {383, 384}}
	if len(got) != len(want) {
		t.Fatalf("runs %v, want %v", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("run %d is %v, want %v", i, got[i], want[i])
		}
	}
}
