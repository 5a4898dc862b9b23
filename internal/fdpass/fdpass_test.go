package fdpass

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"
)

func pair(t testing.TB) (a, b *Conn) {
	t.Helper()
	f, g, err := Pair()
	if err == nil {
		a, err = FromFile(f)
	}
	if err == nil {
		b, err = FromFile(g)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// TestMessages: with no descriptor, some, and more than a system call takes.
func TestMessages(t *testing.T) {
	a, b := pair(t)
	for _, n := range []int{0, 1, 199, 200, 201, 450} {
		var files []*os.File
		for i := range n {
			f, err := os.CreateTemp(t.TempDir(), "")
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprint(f, i)
			files = append(files, f)
			defer f.Close()
		}
		sent := make(chan error, 1)
		body := strings.Repeat("x", n*1000)
		go func() { sent <- a.Send("kind", body, files...) }()
		m, err := b.Receive()
		if err != nil {
			t.Fatal(err)
		}
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		var got string
		if err := m.Decode(&got); err != nil || got != body || m.Kind != "kind" || len(m.Files) != n {
			t.Errorf("%d descriptors: found kind %q, %d bytes, %d descriptors, %v", n, m.Kind, len(got), len(m.Files), err)
		}
		for i, f := range m.Files {
			text := make([]byte, 10)
			k, _ := f.ReadAt(text, 0)
			if string(text[:k]) != fmt.Sprint(i) {
				t.Errorf("descriptor %d of %d is that of %q", i, n, text[:k])
			}
		}
		m.Close()
	}
	a.Close()
	if _, err := b.Receive(); !errors.Is(err, ErrEnded) {
		t.Errorf("after the end: %v", err)
	}
}

// TestHeld: while it is held nothing is taken, and afterwards nothing is lost.
func TestHeld(t *testing.T) {
	a, b := pair(t)
	h := NewHeld(b)
	got := make(chan string, 100)
	go func() {
		for {
			m, err := h.Receive()
			if err != nil {
				close(got)
				return
			}
			got <- m.Kind
		}
	}()
	for i := range 50 {
		h.Hold()
		kind := fmt.Sprint(i)
		if err := a.Send(kind, nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
		select {
		case k := <-got:
			t.Fatalf("%q was taken while it was held", k)
		default:
		}
		if i%2 == 0 { // another process takes it
			m, err := New(h.UnixConn).receiveNow()
			if err != nil || m.Kind != kind {
				t.Fatalf("%q, %v", m.Kind, err)
			}
			h.Continue()
			continue
		}
		h.Continue()
		if k := <-got; k != kind {
			t.Fatalf("expected %q, found %q", kind, k)
		}
	}
	a.Close()
	if k, ok := <-got; ok {
		t.Errorf("%q after the end", k)
	}
}

func (c *Conn) receiveNow() (Message, error) {
	_ = c.SetReadDeadline(time.Time{})
	return c.Receive()
}

// FuzzReceive: whatever a program writes is a message or an error, and nothing large is
// made for it.
func FuzzReceive(f *testing.F) {
	var good [headerSize]byte
	binary.LittleEndian.PutUint32(good[:], magic)
	binary.LittleEndian.PutUint32(good[4:], 12)
	f.Add(append(good[:], `{"kind":"x"}`...))
	f.Add([]byte("govmm v1\n"))
	f.Add(bytes.Repeat([]byte{0xff}, 40))
	f.Fuzz(func(t *testing.T, in []byte) {
		a, b := pair(t)
		go func() {
			_, _ = a.Write(in)
			a.Close()
		}()
		for {
			m, err := b.Receive()
			if err != nil {
				if errors.Is(err, io.EOF) {
					t.Error("a bare io.EOF")
				}
				break
			}
			m.Close()
		}
		a.Close()
		b.Close()
	})
}
