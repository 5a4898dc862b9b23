package unixsock

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
)

func TestPeer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := ln.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, end := range []*net.UnixConn{c.(*net.UnixConn), s} {
		if cred, err := Peer(end); err != nil || int(cred.Pid) != os.Getpid() || CheckPeer(end) != nil {
			t.Errorf("%+v, %v", cred, err)
		}
	}
	for _, tc := range []struct {
		peer, own int
		ok        bool
	}{{0, 0, true}, {1000, 1000, true}, {0, 1000, true}, {1000, 0, false}, {1000, 1001, false}, {65534, 1000, false}} {
		if err := checkUser(tc.peer, tc.own); (err == nil) != tc.ok || err != nil && !errors.Is(err, ErrPeer) {
			t.Errorf("user %d at %d's: %v", tc.peer, tc.own, err)
		}
	}
}
