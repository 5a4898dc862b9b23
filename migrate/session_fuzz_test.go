package migrate

import (
	"bytes"
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"
)

// script turns the bytes of a fuzzer into what a peer says: frames that make sense, in
// any order, and some that make none.
type script struct{ in []byte }

func (s *script) next() byte {
	if len(s.in) == 0 {
		return 0
	}
	b := s.in[0]
	s.in = s.in[1:]
	return b
}

func (s *script) take(n int) []byte {
	n = min(n, len(s.in))
	b := s.in[:n]
	s.in = s.in[n:]
	return b
}

// any adds a frame of any type, with a short payload, and sometimes a length that is a
// lie.
func (s *script) any(to *stream) {
	h := header{typ: frameType(s.next()), flags: s.next(), slot: uint16(s.next()), first: uint64(s.next()), count: uint32(s.next())}
	n := int(s.next())
	if n < 250 {
		to.frame(h, s.take(n))
		return
	}
	var b [headerSize]byte
	h.length = uint32(n) << (4 * (n % 8))
	h.encode(b[:])
	to.Write(b[:])
}

// pages adds pages of any span, packed or not.
func (s *script) pages(t testing.TB, to *stream) {
	count, data, zero := int(s.next()%64)+1, uint64(s.next())*0x101, uint64(s.next())*0x10001
	h := header{typ: framePages, slot: uint16(s.next() % 4), first: uint64(s.next()), count: uint32(count)}
	if s.next()%4 == 0 {
		packed, payload := packedFrame(t, CompressLZ4, count%5+1, 'p')
		packed.slot, packed.first = h.slot, h.first
		to.frame(packed, payload)
		return
	}
	data &= 1<<count - 1
	to.frame(h, pagesPayload(count, data, zero&(1<<count-1)&^(data&uint64(s.next()))))
}

// source writes what a hostile source says by its control connection and by a data
// channel.
func (s *script) source(t testing.TB) (control, data *stream) {
	control, data = new(stream), new(stream)
	for n := 0; len(s.in) > 0 && n < 64; n++ {
		switch s.next() % 18 {
		case 0:
			h := goodHello()
			h.purpose, h.channel, h.dataChannels = purpose(s.next()%5), uint16(s.next()%3), uint16(s.next()%20)
			control.hello(h)
		case 1, 2:
			features := knownFeatures
			if b := int(s.next()); b < len(knownFeatures) {
				features = knownFeatures[:b]
			}
			control.hello(goodHello()).config([]string{"config", "bad"}[s.next()%2], features...)
		case 3:
			control.frame(header{typ: frameStorage}, []byte([]string{"disk", "other"}[s.next()%2]))
		case 4, 5:
			control.frame(header{typ: frameState}, []byte([]string{"state", "bad", "worse", "sticky"}[s.next()%4]))
		case 6:
			control.frame(header{typ: frameCommit}, nil)
		case 7:
			control.control(frameAbort, reason{"x"})
		case 8:
			control.frame(header{typ: frameAlive, flags: s.next()}, nil)
		case 9:
			control.frame(header{typ: frameUndo}, nil)
		case 10:
			n := int(s.next() % 4)
			control.frame(header{typ: frameHashes, count: uint32(n)}, make([]byte, n*hashSize))
		case 11:
			s.any(control)
		case 12, 13, 14:
			s.pages(t, data)
		case 15:
			data.frame(round(uint64(s.next()%4), s.next()), nil)
		case 16:
			s.any(data)
		case 17:
			data.frame(header{typ: frameRenew}, nil)
		}
	}
	return control, data
}

// FuzzSession is a whole migration from a hostile source: hellos, CONFIG, pages,
// rounds, STORAGE, STATE, UNDO, COMMIT and anything else, in any order, by both
// connections. Nothing runs that was not committed, and what does not run is discarded.
func FuzzSession(f *testing.F) {
	f.Add([]byte{1, 255, 0, 12, 2, 5, 2, 0, 0, 1, 0, 15, 0, flagLast, 3, 0, 4, 0, 6})
	f.Add([]byte{1, 255, 0, 15, 0, 0, 12, 1, 1, 0, 1, 64, 0, 15, 1, flagLast, 3, 0, 4, 0, 9, 3, 0, 4, 0, 8, 0, 6})
	f.Add([]byte{1, 255, 0, 10, 2, 15, 0, flagLast, 3, 1, 4, 1, 6})
	f.Add([]byte{1, 0, 1, 7, 0, 1, 1, 1, 11, 32, 0, 0, 0, 0, 251})
	f.Fuzz(func(t *testing.T, in []byte) {
		control, data := (&script{in}).source(t)
		target := serveBytes(t, control.Bytes(), data.Bytes())
		if target.started && target.loaded == nil {
			t.Error("a guest without a state runs")
		}
	})
}

// destination writes what a hostile destination answers by one connection.
func (s *script) destination() []byte {
	to := new(stream)
	for n := int(s.next() % 24); n > 0; n-- {
		switch s.next() % 14 {
		case 0, 1:
			b := s.next()
			to.control(frameHelloOK, helloOK{Version: Version, Channels: uint16(b % 3), Alive: uint16(s.next()) * 16, Features: []string{featureReset}[:b>>7]})
		case 2, 3:
			to.frame(header{typ: frameReady}, nil)
		case 4, 5:
			to.frame(round(uint64(s.next()%4), s.next()), nil)
		case 6:
			to.control(framePrepared, tookMsg{Microseconds: uint64(s.next())})
		case 7:
			to.control(frameRunning, tookMsg{Microseconds: uint64(s.next())})
		case 8:
			to.control(frameRefused, refused{[]string{string(s.take(int(s.next() % 16)))}})
		case 9:
			to.control(frameFailed, reason{string(s.take(int(s.next() % 16)))})
		case 10:
			to.control(frameVerdict, verdictMsg{[]string{verdictRunning, verdictAborted, verdictUnknown, "maybe"}[s.next()%4]})
		case 11:
			to.frame(header{typ: frameAlive, flags: s.next()}, nil)
		default:
			s.any(to)
		}
	}
	return to.Bytes()
}

// FuzzSource is a whole migration to a hostile destination, which answers anything by
// each of the source's connections, the queries after a lost handoff included. A guest
// whose migration failed runs at the source, and one that went away does not.
func FuzzSource(f *testing.F) {
	f.Add([]byte{6, 0, 130, 125, 2, 4, 0, 0, 4, 1, 0, 6, 5, 7, 6, 0, 0})
	f.Add([]byte{5, 0, 130, 125, 2, 4, 0, 0, 4, 1, 0, 6, 5, 0, 1, 10, 1, 1, 10, 2})
	f.Add([]byte{2, 0, 130, 125, 8, 2, 'n', 'o'})
	f.Fuzz(func(t *testing.T, in []byte) {
		runs := &whoRuns{t: t, who: map[string]bool{}}
		src := newToySource(t, runs)
		ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
		defer cancel()
		s := &script{in}
		var dials atomic.Int32
		answers := make(chan []byte, 8)
		for range cap(answers) {
			answers <- s.destination()
		}
		m := New(src, "hostile.example:1", Options{Channels: 1, Dial: func(context.Context, string) (net.Conn, error) {
			if dials.Add(1) > int32(cap(answers)) {
				cancel()
				return nil, errors.New("there is no more")
			}
			return byteConn{bytes.NewReader(<-answers)}, nil
		}})
		_, err := m.Run(ctx)
		switch runsHere := runs.is("source"); {
		case err == nil && runsHere:
			t.Error("the guest has gone, and runs here")
		case err != nil && !errors.Is(err, ErrHandoffUnknown) && !runsHere:
			t.Errorf("the guest runs nowhere: %v", err)
		}
	})
}
