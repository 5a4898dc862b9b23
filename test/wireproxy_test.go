package test

import (
	"encoding/binary"
	"io"
	"net"
	"sync"
	"testing"
)

// Frame types as docs/migration.md has them.
const (
	frameConfig   = 1
	framePages    = 2
	frameRound    = 3
	frameState    = 5
	frameCommit   = 6
	frameHelloOK  = 64
	frameRefused  = 65
	frameReady    = 66
	framePrepared = 67
	frameRunning  = 68
	frameFailed   = 69
)

// wireProxy is between a source and a destination. It calls hook before it passes on a
// frame: if hook returns false, it closes the connections without passing the frame.
// Queries are passed without a call.
type wireProxy struct {
	addr string
	to   string
	hook func(toSource bool, typ byte, arg uint64) bool
}

func newWireProxy(t testing.TB, to string, hook func(toSource bool, typ byte, arg uint64) bool) *wireProxy {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &wireProxy{addr: ln.Addr().String(), to: to, hook: hook}
	var all sync.WaitGroup
	stop := make(chan struct{})
	all.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			all.Go(func() { p.serve(c, stop) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		close(stop)
		all.Wait()
	})
	return p
}

func (p *wireProxy) serve(a net.Conn, stop chan struct{}) {
	defer a.Close()
	b, err := net.Dial("tcp", p.to)
	if err != nil {
		return
	}
	defer b.Close()
	done := make(chan struct{})
	defer close(done)
	go func() {
		select {
		case <-stop:
			a.Close()
			b.Close()
		case <-done:
		}
	}()
	hello := make([]byte, 64)
	if _, err := io.ReadFull(a, hello); err != nil {
		return
	}
	if _, err := b.Write(hello); err != nil {
		return
	}
	if hello[12] == 2 { // a query
		_, _ = io.Copy(a, b)
		return
	}
	var both sync.WaitGroup
	both.Go(func() { p.pump(a, b, false) })
	both.Go(func() { p.pump(b, a, true) })
	both.Wait()
}

func (p *wireProxy) pump(from, to net.Conn, toSource bool) {
	defer from.Close()
	defer to.Close()
	h := make([]byte, 24)
	for {
		if _, err := io.ReadFull(from, h); err != nil {
			return
		}
		if !p.hook(toSource, h[0], binary.LittleEndian.Uint64(h[8:])) {
			return
		}
		if _, err := to.Write(h); err != nil {
			return
		}
		if _, err := io.CopyN(to, from, int64(binary.LittleEndian.Uint32(h[4:]))); err != nil {
			return
		}
	}
}
