package net_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/govmm/govmm/virtio/limit"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// pipe is a backend of channels, so that it works in a bubble of testing/synctest.
type pipe struct{ ports []net.Port }

func newPipe(pairs int) *pipe {
	p := &pipe{}
	for range pairs {
		p.ports = append(p.ports, &pipePort{in: make(chan []byte, 512), stop: make(chan struct{}, 1), out: make(chan []byte, 512)})
	}
	return p
}

func (*pipe) Name() string             { return "pipe" }
func (p *pipe) Ports() []net.Port      { return p.ports }
func (*pipe) Offloads() uint64         { return offloads }
func (*pipe) SetOffloads(uint64) error { return nil }
func (*pipe) SetPairs(int) error       { return nil }
func (*pipe) Close() error             { return nil }

type pipePort struct {
	in, out chan []byte
	stop    chan struct{} // has a value while interrupted
}

func (p *pipePort) Read(b []byte, idle func()) (int, error) {
	idle()
	select {
	case f := <-p.in:
		return copy(b, f), nil
	case <-p.stop:
		p.stop <- struct{}{}
		return 0, net.ErrInterrupted
	}
}

func (p *pipePort) Write(b []byte) error {
	p.out <- append([]byte(nil), b...)
	return nil
}

func (p *pipePort) Interrupt() error {
	select {
	case p.stop <- struct{}{}:
	default:
	}
	return nil
}

func (p *pipePort) Continue() error {
	select {
	case <-p.stop:
	default:
	}
	return nil
}

// Each direction has the rate for itself, and all queues of a direction share it. A
// device that waits for its limit gets quiet at once, and loses nothing.
func TestLimit(t *testing.T) {
	for _, pairs := range []int{1, 2} {
		synctest.Test(t, func(t *testing.T) { testLimit(t, pairs) })
	}
}

func testLimit(t *testing.T, pairs int) {
	const length = 1000 // of a frame
	// The last one is owed.
	const burst, second = limit.MinBurst/length + 1, limit.MinBurst / length
	b := newPipe(pairs)
	features := plain
	if pairs > 1 {
		features |= net.FeatureMultiQueue
	}
	r := newRigWith(t, net.Config{Backend: b, MAC: guestMAC, MTU: 1500, Policy: net.Policy{Limit: limit.Rates{BPS: limit.MinBurst}}}, nil, pairs, features)
	if pairs > 1 && r.command(4, 0, byte(pairs), 0) != 0 {
		t.Fatal("the queues were refused")
	}
	port := func(i int) *pipePort { return b.ports[i%pairs].(*pipePort) }
	sent := func(what string, least, most int) {
		t.Helper()
		time.Sleep(time.Millisecond)
		synctest.Wait()
		n := 0
		for i := range pairs {
			for len(port(i).out) > 0 {
				<-port(i).out
				n++
			}
		}
		if n < least || n > most {
			t.Fatalf("%s: the guest has sent %d frames, want %d to %d", what, n, least, most)
		}
	}
	received := func(what string, least, most int) {
		t.Helper()
		time.Sleep(time.Millisecond)
		synctest.Wait()
		n := 0
		for i := range pairs {
			for {
				if _, ok := r.drivers[2*i].Used(); !ok {
					break
				}
				n++
			}
		}
		if n < least || n > most {
			t.Fatalf("%s: the guest has got %d frames, want %d to %d", what, n, least, most)
		}
	}
	for i := range 200 {
		r.add(2*(i%pairs)+1, []virtiotest.Buffer{{GPA: r.data, Len: net.HeaderBytes + length}}, nil)
		r.add(2*(i%pairs), nil, []virtiotest.Buffer{{GPA: r.data + 1<<20, Len: 2048}})
	}
	sent("the burst", burst, burst+pairs-1)
	for i := range 200 {
		port(i).in <- frame(length)
	}
	received("the burst", burst, burst+pairs-1)
	time.Sleep(time.Second)
	sent("a second", second-pairs, second+pairs)
	received("a second", second-pairs, second+pairs)

	now := time.Now()
	check(t, r.d.Pause(t.Context()))
	for i, q := range r.queues {
		if _, err := q.SaveState(); err != nil {
			t.Errorf("queue %d: %v", i, err)
		}
	}
	if !time.Now().Equal(now) {
		t.Errorf("the pause took %v", time.Since(now))
	}
	time.Sleep(time.Minute)
	check(t, r.d.Resume())
	sent("the burst again", burst, burst+pairs-1)
	received("the burst again", burst, burst+pairs-1)
	time.Sleep(time.Second)
	if c := r.d.Counters(); c.TxFrames != 200 || c.RxFrames != 200 {
		t.Errorf("of 200 frames %d were sent, %d received", c.TxFrames, c.RxFrames)
	}
	r.d.ResetQueue(r.queues[1])
	r.d.Reset()
}

// An invalid frame counts, and a short one counts as Ethernet's shortest.
func TestDroppedFramesCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRigWith(t, net.Config{Backend: newPipe(1), MAC: guestMAC, Policy: net.Policy{Limit: limit.Rates{BPS: 60, BPSBurst: limit.MinBurst}}}, nil, 1, plain&^net.FeatureMTU)
		for range limit.MinBurst/60/200 + 1 {
			for range 200 {
				r.add(1, []virtiotest.Buffer{{GPA: r.data, Len: 1}}, nil)
			}
			time.Sleep(time.Millisecond)
			synctest.Wait()
			for {
				if _, ok := r.drivers[1].Used(); !ok {
					break
				}
			}
		}
		// 1093 of 60 bytes are paid for by the burst, and one is owed.
		if n := r.d.Counters().TxDropped; n != limit.MinBurst/60+1 {
			t.Errorf("%d frames were looked at, want %d", n, limit.MinBurst/60+1)
		}
	})
}
