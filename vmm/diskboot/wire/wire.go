// Package wire is what a VM's process and the one that reads its disk say to each other,
// over a socket: frames of a kind, a length and so many bytes. Neither trusts the other's
// lengths.
package wire

import (
	"encoding/binary"
	"fmt"
	"io"
)

// The kinds of frames. A request is answered by any number of Read and Fault of which each
// is answered by Data or Fault, and then by an Answer, which Bytes follow.
const (
	Request = 'Q' // to the reader: a [Question]
	Data    = 'D' // to the reader: bytes of the disk
	Fault   = 'E' // to the reader: why the disk could not be read
	Read    = 'R' // to the VM: an offset and a length
	Answer  = 'A' // to the VM: a [Reply]
	Bytes   = 'B' // to the VM: bytes of the kernel, then of the initial RAM disk
)

// MaxFrame bounds what follows a frame's head: 1 MiB of a disk.
const MaxFrame = 1 << 20

// Question is what the VM wants to know.
type Question struct {
	Size  int64  // of the disk, in bytes
	Entry string // the entry that is wanted; "": the one that boots
	List  bool   // only the entries, not their files
}

// Entry is a way to boot.
type Entry struct {
	ID      string   `json:"id"`
	Title   string   `json:"title"`
	Source  string   `json:"source"`
	Kernel  string   `json:"kernel"`
	Initrds []string `json:"initrds"`
	Cmdline string   `json:"cmdline"`
}

// Reply is what was found.
type Reply struct {
	Error          string
	NoKernel       bool    // the error is that nothing was found
	Entries        []Entry // of a list; otherwise the one that was chosen
	Kernel, Initrd int64   // bytes that follow
}

// Write sends a frame.
func Write(w io.Writer, kind byte, p []byte) error {
	if len(p) > MaxFrame {
		return fmt.Errorf("a frame of %d bytes: must be at most %d", len(p), MaxFrame)
	}
	var head [5]byte
	head[0] = kind
	binary.LittleEndian.PutUint32(head[1:], uint32(len(p)))
	if _, err := w.Write(append(head[:], p[:min(len(p), 4096)]...)); err != nil {
		return err
	}
	if len(p) <= 4096 {
		return nil
	}
	_, err := w.Write(p[4096:])
	return err
}

// Next reads a frame of at most as many bytes as buffer has, and returns its part with them.
func Next(r io.Reader, buffer []byte) (kind byte, p []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.LittleEndian.Uint32(head[1:])
	if uint64(n) > uint64(len(buffer)) {
		return 0, nil, fmt.Errorf("a frame of %d bytes: must be at most %d", n, len(buffer))
	}
	p = buffer[:n]
	_, err = io.ReadFull(r, p)
	return head[0], p, err
}
