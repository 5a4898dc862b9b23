package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
)

// Kinds of frames.
const (
	ready  = 'r' // the machine is up, and takes a request
	ask    = 'q' // the request, as JSON
	stdout = 'o'
	stderr = 'e'
	exited = 'x' // the exit status, decimal
	broken = 'b' // the machine cannot run the command, and why
)

// maxFrame bounds a frame's content, in bytes.
const maxFrame = 1 << 20

// wire is one end of the line between machine and host. A frame is its kind, a
// byte, its length in four, big endian, and its content.
type wire struct {
	mu sync.Mutex // guards writes
	rw io.ReadWriter
}

func (w *wire) send(kind byte, p []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(p) > maxFrame {
		return fmt.Errorf("a frame of %d bytes", len(p))
	}
	b := append([]byte{kind}, binary.BigEndian.AppendUint32(nil, uint32(len(p)))...)
	_, err := w.rw.Write(append(b, p...))
	return err
}

func (w *wire) receive() (kind byte, p []byte, err error) {
	var h [5]byte
	if _, err := io.ReadFull(w.rw, h[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(h[1:])
	if n > maxFrame {
		return 0, nil, fmt.Errorf("a frame of %d bytes", n)
	}
	p = make([]byte, n)
	_, err = io.ReadFull(w.rw, p)
	return h[0], p, err
}

// stream is a writer whose writes become frames.
type stream struct {
	w    *wire
	kind byte
}

func (s stream) Write(p []byte) (int, error) {
	for at := 0; at < len(p); at += maxFrame {
		if err := s.w.send(s.kind, p[at:min(at+maxFrame, len(p))]); err != nil {
			return at, err
		}
	}
	return len(p), nil
}
