package migrate

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"
)

// A name is resolved once: every connection after the first goes to the peer that
// the first one reached.
func TestAddressIsResolvedOnce(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, port, err := net.SplitHostPort(ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d := newDialer(net.JoinHostPort("localhost", port), Options{PeerTimeout: time.Minute})
	for range 2 {
		c, err := d.connect(context.Background(), newHello(purposeQuery, sessionID{1}))
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		d.address = "now.invalid:1" // the name stands for nothing any more
	}
}

// The user's Dial gets the address as it is, and a time by which to be done.
func TestOwnDial(t *testing.T) {
	d := newDialer("whatever it is", Options{PeerTimeout: time.Millisecond, Dial: func(ctx context.Context, address string) (net.Conn, error) {
		if address != "whatever it is" {
			t.Errorf("dialled %q", address)
		}
		<-ctx.Done()
		return nil, ctx.Err()
	}})
	if _, err := d.connect(context.Background(), hello{}); err == nil || !strings.HasPrefix(err.Error(), "connect to whatever it is: ") {
		t.Errorf("error %v", err)
	}
}
