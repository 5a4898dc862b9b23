package vsock

import (
	"context"
	"testing"
	"time"

	"github.com/govmm/govmm/virtio/virtiotest"
)

// What a guest sends that has no place is answered with RST, or with nothing.
func TestStrangePackets(t *testing.T) {
	request := header{SrcCID: guestCID, DstCID: hostCID, SrcPort: 1, DstPort: 2, Type: typeStream, Op: opRequest}
	with := func(change func(*header)) header {
		h := request
		change(&h)
		return h
	}
	r := newRig(t, layouts["split"])
	for name, tt := range map[string]struct {
		h      header
		answer bool
	}{
		"another type":          {with(func(h *header) { h.Type = 2 }), true},
		"another guest":         {with(func(h *header) { h.DstCID = 77 }), true},
		"the hypervisor":        {with(func(h *header) { h.DstCID = 0 }), true},
		"a CID of 64 bits":      {with(func(h *header) { h.DstCID = 1<<32 + hostCID }), true},
		"from another CID":      {with(func(h *header) { h.SrcCID = 43 }), false},
		"RST of another type":   {with(func(h *header) { h.Type, h.Op = 2, opReset }), false},
		"RST of no connection":  {with(func(h *header) { h.Op = opReset }), false},
		"data of none":          {with(func(h *header) { h.Op = opData }), true},
		"an answer to nothing":  {with(func(h *header) { h.Op = opResponse }), true},
		"credit of none":        {with(func(h *header) { h.Op = opCreditUpdate }), true},
		"an unknown operation":  {with(func(h *header) { h.Op = 99 }), true},
		"an impossible length":  {with(func(h *header) { h.Len = 1 << 31 }), true},
		"a port without number": {with(func(h *header) { h.DstPort = 1<<32 - 1 }), true},
	} {
		t.Run(name, func(t *testing.T) {
			r.send(tt.h, nil)
			if tt.answer {
				h, _ := r.recv()
				if h.Op != opReset || h.SrcCID != tt.h.DstCID || h.SrcPort != tt.h.DstPort || h.DstPort != tt.h.SrcPort || h.Type != tt.h.Type {
					t.Errorf("answered by %+v", h)
				}
			}
			r.idle()
			r.released(0)
		})
	}
}

// What must not come on a connection ends it.
func TestStrangeOnConnection(t *testing.T) {
	for name, act := range map[string]func(p *peer){
		"a second request":       func(p *peer) { p.send(opRequest, 0, nil) },
		"a second answer":        func(p *peer) { p.send(opResponse, 0, nil) },
		"an unknown operation":   func(p *peer) { p.send(0, 0, nil) },
		"more than credit":       func(p *peer) { p.send(opData, 0, pattern(bufferSize+1)) },
		"data behind its end":    func(p *peer) { p.send(opShutdown, shutSend, nil); p.send(opData, 0, []byte("x")) },
		"both ends at once":      func(p *peer) { p.send(opShutdown, 0xffffffff, nil) },
		"the ends one by one":    func(p *peer) { p.send(opShutdown, shutSend, nil); p.send(opShutdown, shutReceive, nil) },
		"an end that is nothing": func(p *peer) { p.send(opShutdown, 0, nil); p.send(99, 0, nil) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, layouts["split"])
			c, p := r.connect(1)
			act(p)
			p.expect(opReset)
			c.end()
			r.released(0)
			r.idle()
		})
	}
}

// Before the host's program has answered, only little may come.
func TestTooEarly(t *testing.T) {
	r := newRig(t, layouts["split"])
	for op := uint16(0); op < 9; op++ {
		c := dial(t, r.path)
		c.say("CONNECT 80\n")
		h, _ := r.recv()
		p := &peer{r: r, host: h.SrcPort, guest: 80}
		p.send(op, 0, nil)
		switch op {
		case opResponse, opCreditUpdate, opCreditRequest, opReset:
			if op == opCreditRequest {
				p.expect(opCreditUpdate)
			}
			if op != opReset {
				p.send(opReset, 0, nil)
			}
		default:
			p.expect(opReset)
		}
		r.gone(0)
	}
	r.idle()
}

func TestBrokenRequests(t *testing.T) {
	for name, act := range map[string]func(r *rig){
		"a packet without header": func(r *rig) {
			r.add(transmitQueue, []virtiotest.Buffer{{GPA: r.txGPA(), Len: headerBytes - 1}}, nil)
		},
		"a packet that is written": func(r *rig) {
			r.add(transmitQueue, nil, []virtiotest.Buffer{{GPA: r.txGPA(), Len: 100}})
		},
		"data that is not there": func(r *rig) {
			h := header{SrcCID: guestCID, DstCID: hostCID, Type: typeStream, Op: opData, Len: 1 << 31}
			r.submit(h, pattern(100))
		},
		"no memory": func(r *rig) {
			r.add(transmitQueue, []virtiotest.Buffer{{GPA: 1 << 40, Len: 100}}, nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, layouts["split"])
			c, _ := r.connect(1)
			act(r)
			r.needsReset()
			c.end() // the connection ends
			refused := dial(t, r.path)
			refused.say("CONNECT 1\n")
			refused.end()
		})
	}
	t.Run("a receive buffer without room", func(t *testing.T) {
		r := newBareRig(t, layouts["split"])
		r.add(receiveQueue, nil, []virtiotest.Buffer{{GPA: r.free, Len: headerBytes}})
		c := dial(t, r.path)
		c.say("CONNECT 1\n")
		r.needsReset()
		c.end()
	})
	t.Run("an event buffer without room", func(t *testing.T) {
		r := newBareRig(t, layouts["split"])
		state, err := r.d.SaveState()
		check(t, err)
		saved := r.save()
		r.d.Reset()
		check(t, r.d.Close())
		d := newDevice(t, r.path)
		check(t, d.LoadState(state))
		r.attach(d, saved)
		t.Cleanup(d.Reset)
		r.add(eventQueue, nil, []virtiotest.Buffer{{GPA: r.free, Len: 3}})
		r.needsReset()
	})
}

// A guest that asks for ever and takes no answers does not fill the host's
// memory: its requests wait, and go on when it does.
func TestAnswersNotTaken(t *testing.T) {
	for name, features := range layouts {
		t.Run(name, func(t *testing.T) {
			r := newBareRig(t, features)
			h := header{SrcCID: guestCID, DstCID: hostCID, SrcPort: 1, DstPort: 2, Type: typeStream, Op: opData}
			for range maxResets {
				r.send(h, nil)
			}
			r.submit(h, nil)
			for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
				r.d.serving.Lock()
				n := len(r.d.resets)
				r.d.serving.Unlock()
				if n == maxResets {
					break
				}
				if time.Now().After(end) {
					t.Fatalf("%d refusals wait", n)
				}
			}
			if _, ok := r.drivers[transmitQueue].Used(); ok {
				t.Fatal("the guest's packet was taken")
			}
			check(t, r.d.Pause(context.Background()))
			check(t, r.d.Resume())
			for i := range rxBuffers {
				r.post(r.free + uint64(i)*rxBytes)
			}
			for range maxResets + 1 {
				if h, _ := r.recv(); h.Op != opReset {
					t.Fatalf("%+v", h)
				}
			}
			r.wait(transmitQueue)
			r.idle()
		})
	}
}
