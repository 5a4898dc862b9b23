package migrate

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
)

// fault is where in the exchange a connection fails: at a frame of a type, in one
// direction, before or after it is passed on.
type fault struct {
	toSource bool
	typ      frameType
	channel  uint16 // data channel; 0: any connection
	flags    uint8  // of the frame, all of them set
	after    bool
	hang     bool // go silent instead of closing
	pass     bool // do neither
}

func (f fault) String() string {
	s := "before "
	if f.after {
		s = "after "
	}
	s += f.typ.String()
	if f.toSource {
		s += " to the source"
	}
	if f.channel > 0 {
		s += fmt.Sprintf(" of channel %d", f.channel)
	}
	if f.flags&flagLast != 0 {
		s += ", the last"
	}
	if f.hang {
		s += " hangs"
	}
	return s
}

// faultyProxy is between the two sides and fails once; it passes queries on.
type faultyProxy struct {
	ln     net.Listener
	to     string
	asked  string // who gets the queries
	fault  fault
	struck chan struct{}
	once   sync.Once
	wg     sync.WaitGroup
	stop   chan struct{}
	onHit  func() // called before the connections end
}

func startProxy(t *testing.T, to string, f fault, onHit func()) *faultyProxy {
	return startForgetfulProxy(t, to, to, f, onHit)
}

// startForgetfulProxy passes queries on to another receiver.
func startForgetfulProxy(t *testing.T, to, asked string, f fault, onHit func()) *faultyProxy {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &faultyProxy{ln: ln, to: to, asked: asked, fault: f, struck: make(chan struct{}), stop: make(chan struct{}), onHit: onHit}
	p.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			p.wg.Go(func() { p.serve(c) })
		}
	})
	t.Cleanup(func() {
		close(p.stop)
		ln.Close()
		p.wg.Wait()
	})
	return p
}

func (p *faultyProxy) serve(a net.Conn) {
	defer a.Close()
	var hello [helloSize]byte
	if _, err := io.ReadFull(a, hello[:]); err != nil {
		return
	}
	to := p.to
	if purpose(hello[12]) == purposeQuery {
		to = p.asked
	}
	b, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer b.Close()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-p.stop:
			a.Close()
			b.Close()
		case <-stop:
		}
	}()
	if _, err := b.Write(hello[:]); err != nil {
		return
	}
	if purpose(hello[12]) == purposeQuery {
		_, _ = io.Copy(a, b)
		return
	}
	var wg sync.WaitGroup
	channel := binary.LittleEndian.Uint16(hello[14:])
	wg.Go(func() { p.pump(a, b, channel, false) })
	wg.Go(func() { p.pump(b, a, channel, true) })
	wg.Wait()
}

// pump passes frames on until the fault.
func (p *faultyProxy) pump(from, to net.Conn, channel uint16, toSource bool) {
	var b [headerSize]byte
	for {
		if _, err := io.ReadFull(from, b[:]); err != nil {
			to.Close()
			return
		}
		h := decodeHeader(b[:])
		payload := make([]byte, h.length)
		if _, err := io.ReadFull(from, payload); err != nil {
			to.Close()
			return
		}
		hit := h.typ == p.fault.typ && toSource == p.fault.toSource && h.flags&p.fault.flags == p.fault.flags &&
			(p.fault.channel == 0 || p.fault.channel == channel)
		if hit && !p.fault.after && p.strike(from, to) {
			return
		}
		if _, err := to.Write(append(b[:], payload...)); err != nil {
			return
		}
		if hit && p.fault.after && p.strike(from, to) {
			return
		}
	}
}

func (p *faultyProxy) strike(a, b net.Conn) bool {
	p.once.Do(func() {
		p.onHit()
		close(p.struck)
	})
	if p.fault.pass {
		return false
	}
	if p.fault.hang {
		<-p.stop
		return true
	}
	a.Close()
	b.Close()
	return true
}
