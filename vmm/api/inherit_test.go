package api

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestInheritedClaim: the socket and the name go to another process without a moment in which
// a connection is refused or the name is free; who leaves removes nothing.
func TestInheritedClaim(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.sock")
	c, err := ClaimSocket(path, "a")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Record([]byte(`{"x":1}`)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.lock.WriteString("y"); err == nil {
		t.Error("the record can be written through the lock")
	}
	serve := func(ln net.Listener) {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("x"))
			conn.Close()
		}
	}
	ln, err := c.Listen()
	if err != nil {
		t.Fatal(err)
	}
	go serve(ln)
	stop := make(chan struct{})
	var clients sync.WaitGroup
	clients.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			conn, err := net.Dial("unix", path)
			if err != nil {
				t.Errorf("connection %d: %v", n, err)
				return
			}
			_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
			if _, err := conn.Read(make([]byte, 1)); err != nil {
				t.Errorf("connection %d: %v", n, err)
			}
			conn.Close()
		}
	})
	for range 20 {
		record, err := OpenRecord(path, os.Getuid())
		if err != nil {
			t.Fatal(err)
		}
		if text, err := ReadRecord(record); err != nil || string(text) != `{"x":1}` {
			t.Fatalf("record %q, %v", text, err)
		}
		files, err := c.Files()
		if err != nil {
			t.Fatal(err)
		}
		// One that is given up changes nothing.
		again, err := c.Files()
		if err != nil {
			t.Fatal(err)
		}
		failed, err := Inherit(path, "a", record, again)
		if err != nil {
			t.Fatal(err)
		}
		failed.Release()
		next, err := Inherit(path, "a", record, files)
		if err != nil {
			t.Fatal(err)
		}
		record.Close()
		c.Hold()
		time.Sleep(time.Millisecond)
		next.Own()
		ln, err := next.Listen()
		if err != nil {
			t.Fatal(err)
		}
		c.Leave()
		c.Release()
		go serve(ln)
		if _, err := ClaimSocket(path, "a"); err == nil || !strings.Contains(err.Error(), "running") {
			t.Fatalf("the name is free: %v", err)
		}
		c = next
	}
	close(stop)
	clients.Wait()
	c.Release()
	for _, p := range []string{path, lockOf(path)} {
		if _, err := os.Lstat(p); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", p, err)
		}
	}
	other, err := ClaimSocket(path, "a")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Release()
	if _, err := OpenRecord(path, os.Getuid()+1); err == nil {
		t.Error("a record of another user is read")
	}
}
