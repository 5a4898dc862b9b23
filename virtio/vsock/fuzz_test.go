package vsock

import (
	"bytes"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// FuzzRequests has a guest send packets of any kind, among them such as fit
// the connections that there are. Every one is taken, or the device needs a
// reset; what the device sends keeps to the protocol; and in the end nothing
// is left.
func FuzzRequests(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 0, 5, 0, 0, 9, 0, 4, 0, 0, 0, 3})
	f.Add([]byte{1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 5, 1, 0, 255, 0, 7, 1, 0, 0, 0, 3, 1, 0, 0, 0})
	f.Add([]byte{2, 2, 0, 0, 0, 5, 2, 0, 40, 0, 4, 2, 0, 0, 2, 5, 2, 0, 1, 0, 6, 2, 0, 0, 0})
	f.Add([]byte{5, 2, 8, 200, 0, 99, 2, 3, 0, 0, 1, 3, 0, 0, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		r := newRig(t, layouts["split"])
		l := r.listen(52)
		ended := make(chan struct{})
		go func() { // echoes
			defer close(ended)
			for {
				c, err := l.AcceptUnix()
				if err != nil {
					return
				}
				go echo(c)
			}
		}()
		client := dial(t, r.path)
		client.say("CONNECT 80\n")
		asked, _ := r.recv()

		// The guest's ends: one the host opened, others to a listener and none.
		peers := []*peer{
			{r: r, host: 52, guest: 1000}, {r: r, host: 52, guest: 1001},
			{r: r, host: asked.SrcPort, guest: 80}, {r: r, host: 99, guest: 1000},
		}
		broken := false
		drain := func(wait time.Duration) {
			timeout := time.After(wait)
			for !broken {
				if u, ok := r.drivers[receiveQueue].Used(); ok {
					h, _ := r.take(u)
					if h.Op == 0 || h.Op > opCreditRequest || h.Flags&^shutBoth != 0 || h.Len > 0 && h.Op != opData {
						t.Fatalf("the device sends %+v", h)
					}
					continue
				}
				if _, ok := r.drivers[transmitQueue].Used(); ok {
					continue
				}
				if r.drivers[transmitQueue].InFlight() == 0 {
					return
				}
				select {
				case <-r.interrupts[receiveQueue]:
				case <-r.interrupts[transmitQueue]:
				case err := <-r.broken:
					broken = err != nil
				case <-timeout:
					t.Fatal("the device does not answer")
				}
			}
		}
		for n := 0; len(in) >= 5 && n < 40 && !broken; n++ {
			op, who, odd, size, flags := in[0], in[1], in[2], int(in[3])*300, in[4]
			in = in[5:]
			p := peers[int(who)%len(peers)]
			p.alloc = uint32(flags) * 1000
			h := p.packet(uint16(op), uint32(flags), nil)
			h.Len = uint32(size)
			switch odd % 16 {
			case 1:
				h.Type = 2
			case 2:
				h.DstCID = uint64(size)
			case 3:
				h.SrcCID = uint64(size)
			case 4:
				h.FwdCnt = uint32(size) << 16
			case 5:
				h.Len += 1 << 16
			case 6:
				h.Flags |= 1 << 31
			case 7:
				h.BufAlloc = 1<<32 - 1
			case 8:
				r.add(transmitQueue, []virtiotest.Buffer{{GPA: r.txGPA(), Len: uint32(size)}}, nil)
				drain(patience)
				continue
			}
			r.submit(h, pattern(min(size, 65536)))
			drain(patience)
		}
		check(t, l.Close())
		<-ended
		_ = client.Close() // it may have been closed
		r.d.Reset()
		r.released(0)
	})
}

// echo sends back what it gets.
func echo(c *net.UnixConn) {
	defer c.Close()
	b := make([]byte, 4096)
	for {
		n, err := c.Read(b)
		if err != nil {
			return
		}
		if _, err := c.Write(b[:n]); err != nil {
			return
		}
	}
}

// FuzzState loads anything: it is refused, or it is what is saved again.
func FuzzState(f *testing.F) {
	good, err := strictcbor.Marshal(State{CID: DefaultCID, NextPort: firstPort, Resets: []Reset{{CID: 2, HostPort: 1, GuestPort: 2, Type: 1}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := New(Config{Path: "v"}, nil)
		check(t, err)
		dst, err := New(Config{Path: "v"}, nil)
		check(t, err)
		if d.LoadState(b) != nil {
			return
		}
		once, err := d.SaveState()
		check(t, err)
		check(t, dst.LoadState(once))
		if twice, err := dst.SaveState(); err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%x, then %x, %v", once, twice, err)
		}
	})
}

// FuzzConfig parses anything: what is taken means the same when it is printed.
func FuzzConfig(f *testing.F) {
	f.Add("cid=3,path=/run/x.sock")
	f.Add("a,,b,cid=7")
	f.Fuzz(func(t *testing.T, option string) {
		c, err := ParseConfig(option)
		if err != nil {
			return
		}
		if again, err := ParseConfig(fmt.Sprint(c)); err != nil || again != c {
			t.Fatalf("%+v, then %+v, %v", c, again, err)
		}
	})
}
