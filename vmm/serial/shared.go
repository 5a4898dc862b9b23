package serial

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Shared is a [Backend] at which others can look on, and one of them can write: the end of
// a line that is attached to after its VM was started. What was written last is kept for
// who comes later. The zero value of its buffer takes no memory before there is output.
type Shared struct {
	Backend

	shareMu sync.Mutex // guards all below
	kept    ring
	viewers map[*Viewer]struct{}
	writer  *Viewer
	typed   []byte        // by the writer, and not read yet
	wake    func()        // ends the ReadInput of the Backend that is under way; nil: none is
	changed chan struct{} // closed when typed or closed changes, or there is room in typed
	closed  bool
}

const (
	// Scrollback is how many bytes of output are kept for a [Viewer] that comes, and how
	// many wait for one that does not read.
	Scrollback = 64 << 10
	// maxViewers bounds the memory for what waits.
	maxViewers = 32
	// maxTyped bounds what a writer has typed and the guest has not read.
	maxTyped = 4 << 10
)

var (
	// ErrHasWriter is the error for a second writer, ErrCrowded that for one viewer too many.
	ErrHasWriter = errors.New("another one writes to this line")
	ErrCrowded   = fmt.Errorf("%d look on at this line already", maxViewers)
	// errViewerClosed ends the calls of a viewer.
	errViewerClosed = errors.New("the line was detached from")
)

// Share makes the other end of a line one that is shared.
func Share(b Backend) *Shared {
	return &Shared{Backend: b, viewers: map[*Viewer]struct{}{}, changed: make(chan struct{})}
}

// Write writes to the other end and to all who look on, none of whom it waits for.
func (s *Shared) Write(p []byte) (int, error) {
	s.shareMu.Lock()
	s.kept.add(p)
	for v := range s.viewers {
		v.put(p)
	}
	s.shareMu.Unlock()
	return s.Backend.Write(p)
}

// announce tells those who wait that something has changed. shareMu is held.
func (s *Shared) announce() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// ReadInput implements [Input]: what the other end brings, and what a viewer has typed.
func (s *Shared) ReadInput(ctx context.Context, p []byte) (int, error) {
	over := false // the Backend has no more input
	for {
		s.shareMu.Lock()
		if n := copy(p, s.typed); n > 0 {
			s.typed = append(s.typed[:0], s.typed[n:]...)
			s.announce()
			s.shareMu.Unlock()
			return n, nil
		}
		if s.closed {
			s.shareMu.Unlock()
			return 0, io.EOF
		}
		inner, cancel := context.WithCancel(ctx)
		s.wake = cancel
		changed := s.changed
		s.shareMu.Unlock()
		n, err := 0, error(nil)
		if over {
			select {
			case <-changed:
			case <-inner.Done():
			}
		} else {
			n, err = s.Backend.ReadInput(inner, p)
		}
		cancel()
		s.shareMu.Lock()
		s.wake = nil
		s.shareMu.Unlock()
		switch {
		case n > 0:
			return n, nil
		case ctx.Err() != nil:
			return 0, ctx.Err()
		case errors.Is(err, io.EOF):
			over = true
		case err != nil && inner.Err() == nil:
			return 0, err
		}
	}
}

// Close ends the line for all.
func (s *Shared) Close() error {
	s.shareMu.Lock()
	s.closed = true
	for v := range s.viewers {
		v.end(io.EOF)
	}
	clear(s.viewers)
	s.announce()
	if s.wake != nil {
		s.wake()
	}
	s.shareMu.Unlock()
	return s.Backend.Close()
}

// Attach adds a viewer, which first reads what was kept. At most one viewer may write; a
// second one gets [ErrHasWriter].
func (s *Shared) Attach(write bool) (*Viewer, error) {
	s.shareMu.Lock()
	defer s.shareMu.Unlock()
	if s.closed {
		return nil, io.EOF
	}
	switch {
	case write && s.writer != nil:
		return nil, ErrHasWriter
	case len(s.viewers) == maxViewers:
		return nil, ErrCrowded
	}
	v := &Viewer{line: s, ready: make(chan struct{}, 1), gone: make(chan struct{})}
	v.put(s.kept.bytes())
	if write {
		s.writer = v
	}
	s.viewers[v] = struct{}{}
	return v, nil
}

// Viewer is one that looks on at a [Shared] line.
type Viewer struct {
	line  *Shared
	ready chan struct{} // there is something to read
	gone  chan struct{} // closed at the end

	queueMu sync.Mutex // guards all below
	queue   ring
	err     error // why no more comes
}

func (v *Viewer) put(p []byte) {
	if len(p) == 0 {
		return
	}
	v.queueMu.Lock()
	defer v.queueMu.Unlock()
	v.queue.add(p)
	select {
	case v.ready <- struct{}{}:
	default:
	}
}

func (v *Viewer) end(err error) {
	v.queueMu.Lock()
	defer v.queueMu.Unlock()
	if v.err == nil {
		v.err = err
		close(v.gone)
	}
}

// Read returns output that was not read yet, the oldest first; of more than [Scrollback]
// bytes that wait the first are lost. At the end of the line the error is io.EOF.
func (v *Viewer) Read(p []byte) (int, error) {
	for {
		v.queueMu.Lock()
		n, err := v.queue.take(p), v.err
		v.queueMu.Unlock()
		switch {
		case n > 0:
			return n, nil
		case err != nil:
			return 0, err
		}
		select {
		case <-v.ready:
		case <-v.gone:
		}
	}
}

// Write types into the line, if the viewer may write. It waits while the guest does not
// read.
func (v *Viewer) Write(p []byte) (n int, err error) {
	s := v.line
	for {
		s.shareMu.Lock()
		if s.writer != v || s.closed {
			s.shareMu.Unlock()
			return n, errViewerClosed
		}
		some := min(len(p)-n, maxTyped-len(s.typed))
		if some > 0 {
			s.typed = append(s.typed, p[n:n+some]...)
			n += some
			s.announce()
			if s.wake != nil {
				s.wake()
			}
		}
		changed := s.changed
		s.shareMu.Unlock()
		if n == len(p) {
			return n, nil
		}
		select {
		case <-changed:
		case <-v.gone:
		}
	}
}

// Gone is closed when the viewer has ended.
func (v *Viewer) Gone() <-chan struct{} { return v.gone }

// Close detaches.
func (v *Viewer) Close() error {
	s := v.line
	s.shareMu.Lock()
	defer s.shareMu.Unlock()
	delete(s.viewers, v)
	if s.writer == v {
		s.writer = nil
	}
	v.end(errViewerClosed)
	return nil
}

// ring keeps the last [Scrollback] bytes that were added.
type ring struct {
	buf   []byte
	start int // of the oldest byte, once the buffer is full
	full  bool
}

func (r *ring) add(p []byte) {
	if len(p) > Scrollback {
		p = p[len(p)-Scrollback:]
	}
	if room := Scrollback - len(r.buf); !r.full && room > 0 {
		n := min(room, len(p))
		r.buf, p = append(r.buf, p[:n]...), p[n:]
	}
	if len(p) == 0 {
		return
	}
	r.full = true
	for len(p) > 0 {
		n := copy(r.buf[r.start:], p)
		r.start, p = (r.start+n)%Scrollback, p[n:]
	}
}

// bytes are all that is kept.
func (r *ring) bytes() []byte {
	return append(append(make([]byte, 0, len(r.buf)), r.buf[r.start:]...), r.buf[:r.start]...)
}

// take removes the oldest bytes.
func (r *ring) take(p []byte) int {
	all := r.bytes()
	n := copy(p, all)
	if n > 0 {
		*r = ring{buf: all[n:]}
	}
	return n
}
