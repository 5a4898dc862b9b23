package migrate

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
)

// loadingSession is a session whose state is being loaded, and waits for memory.
func loadingSession(t *testing.T, timeout time.Duration) (*session, *intake, Missing) {
	t.Helper()
	target := &heapTarget{t: t, mem: [2][]byte{make([]byte, 128*mempage.Size), make([]byte, mempage.Size)}}
	in := newIntake(sessionID{1}, identity{}, timeout, target)
	m, err := target.Miss([][]uint64{{^uint64(0), ^uint64(0)}, {0}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	in.missing = m
	return &session{ctx: context.Background(), undos: make(chan reply)}, in, m
}

// A source that announces memory, lives, and sends nothing of what loading waits for does not
// hold the receiver's place; nor does one that sends a page now and then.
func TestLoadingEnds(t *testing.T) {
	for name, slowly := range map[string]bool{"nothing comes": false, "a page now and then": true} {
		t.Run(name, func(t *testing.T) {
			s, in, m := loadingSession(t, 10*time.Millisecond)
			over := make(chan struct{})
			defer close(over)
			if slowly {
				go func() {
					for i := uint64(0); i < 128; i++ {
						select {
						case <-over:
							return
						case <-time.After(5 * time.Millisecond):
						}
						_ = m.Land(0, 0, 128, []uint64{1 << i, 1 << (i - 64)}, nil) // a shift by more than a word is 0
					}
				}()
			}
			_, err := s.whileLoading(in, make(chan struct{}))
			if err == nil || !strings.Contains(err.Error(), "memory that comes later") {
				t.Errorf("%v", err)
			}
			if in.armed() != nil || !isClosed(m.Gone()) {
				t.Error("what is missing has not been given up")
			}
		})
	}
}

// Loading that ends in time, a stop that is undone and the loss of the source end the watch
// without an error of its own.
func TestLoadingGoesOn(t *testing.T) {
	s, in, _ := loadingSession(t, time.Hour)
	loaded := make(chan struct{})
	close(loaded)
	if undo, err := s.whileLoading(in, loaded); undo.typ != 0 || err != nil || in.armed() == nil {
		t.Errorf("loaded: %v, %v, armed %v", undo, err, in.armed() != nil)
	}
	go func() { s.undos <- reply{header{typ: frameUndo, first: 1}, nil} }()
	if undo, err := s.whileLoading(in, make(chan struct{})); undo.typ != frameUndo || err != nil || in.armed() != nil {
		t.Errorf("undone: %v, %v, armed %v", undo, err, in.armed() != nil)
	}
	s, in, _ = loadingSession(t, time.Hour)
	ctx, cancel := context.WithCancel(context.Background())
	s.ctx = ctx
	cancel()
	if undo, err := s.whileLoading(in, make(chan struct{})); undo.typ != 0 || err != nil || in.armed() != nil {
		t.Errorf("lost: %v, %v, armed %v", undo, err, in.armed() != nil)
	}
}

// A set takes each of its connections once, whatever a source that knows its session does.
func TestSetTakesEachConnectionOnce(t *testing.T) {
	_, in, _ := loadingSession(t, time.Minute)
	in.lost = func(*conn, Missing, error) {}
	join := func(channel uint16) <-chan error {
		a, b := net.Pipe()
		t.Cleanup(func() { a.Close() })
		go func() { _, _ = io.Copy(io.Discard, a) }()
		served := make(chan error, 1)
		go func() {
			h := newHello(purposeMissing, in.id)
			h.channel, h.set = channel, 1
			served <- in.serve(h, newConn(b))
		}()
		return served
	}
	join(1)
	for there := false; !there; time.Sleep(time.Millisecond) {
		in.intakeMu.Lock()
		there = in.set != nil
		in.intakeMu.Unlock()
	}
	first, second := join(2), join(2)
	select {
	case err := <-first:
		if !errors.Is(err, ErrProtocol) {
			t.Error(err)
		}
	case err := <-second:
		if !errors.Is(err, ErrProtocol) {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Error("two connections of one number are served")
	}
	in.end()
}
