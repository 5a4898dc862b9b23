// Package fdpass passes messages with open descriptors between two processes of a host,
// over a unix stream socket (unix(7), SCM_RIGHTS).
package fdpass

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	_ "github.com/govmm/govmm/internal/supported" // Linux on x86-64 only
	"golang.org/x/sys/unix"
)

// Bounds of a message. What exceeds them is an error: the peer may be any program.
const (
	MaxBody  = 4 << 20 // bytes of JSON
	MaxFiles = 4096
	// perCall is how many descriptors go with one system call; the kernel takes 253
	// (SCM_MAX_FD).
	perCall = 200
)

// magic begins a message, so that a program that prints something else is noticed at once.
const magic = 0x4d564748 // "HGVM"

const headerSize = 16

// Message is what was received.
type Message struct {
	Kind  string
	Body  json.RawMessage
	Files []*os.File // of whoever receives it
}

// Decode decodes the body, and refuses fields that v does not have.
func (m *Message) Decode(v any) error {
	d := json.NewDecoder(bytes.NewReader(m.Body))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("message %.40q: %w", m.Kind, err)
	}
	return nil
}

// Close closes the files.
func (m *Message) Close() {
	for _, f := range m.Files {
		_ = f.Close()
	}
	m.Files = nil
}

// Conn is one end of the socket. Send may be called from several goroutines, Receive from
// one.
type Conn struct {
	*net.UnixConn
	sending sync.Mutex // held while a message is sent
}

// New returns a Conn over a socket, which it takes over.
func New(c *net.UnixConn) *Conn { return &Conn{UnixConn: c} }

// FromFile returns a Conn over a socket that another process has passed. It takes the file
// over, also if it fails.
func FromFile(f *os.File) (*Conn, error) {
	c, err := net.FileConn(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("expected a unix socket, found %v", c.LocalAddr().Network()), c.Close())
	}
	return New(u), nil
}

// Pair returns the two ends of a new socket.
func Pair() (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "socketpair"), os.NewFile(uintptr(fds[1]), "socketpair"), nil
}

// sent is a message as it goes.
type sent struct {
	Kind string `json:"kind"`
	Body any    `json:"body,omitempty"`
}

type received struct {
	Kind string          `json:"kind"`
	Body json.RawMessage `json:"body"`
}

// Number returns the descriptor of a file, which stays open for as long as the file does. Unlike
// Fd it never changes whether the descriptor blocks, which all processes that have it would
// notice.
func Number(f *os.File) (fd int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	err = raw.Control(func(n uintptr) { fd = int(n) })
	return fd, err
}

// Send sends a message. The files stay the caller's.
func (c *Conn) Send(kind string, body any, files ...*os.File) error {
	text, err := json.Marshal(sent{kind, body})
	if err != nil {
		return err
	}
	if len(text) > MaxBody || len(files) > MaxFiles {
		return fmt.Errorf("message %s of %d bytes with %d descriptors: must be at most %d and %d", kind, len(text), len(files), MaxBody, MaxFiles)
	}
	c.sending.Lock()
	defer c.sending.Unlock()
	head := make([]byte, headerSize)
	binary.LittleEndian.PutUint32(head, magic)
	binary.LittleEndian.PutUint32(head[4:], uint32(len(text)))
	binary.LittleEndian.PutUint32(head[8:], uint32(len(files)))
	// The descriptors go with the header, and with one more byte for each further call.
	for rest := head; ; rest = []byte{0} {
		fds := make([]int, 0, perCall)
		for _, f := range files[:min(len(files), perCall)] {
			fd, err := Number(f)
			if err != nil {
				return fmt.Errorf("send %s: %w", kind, err)
			}
			fds = append(fds, fd)
		}
		files = files[len(fds):]
		var rights []byte
		if len(fds) > 0 {
			rights = unix.UnixRights(fds...)
		}
		if _, _, err := c.WriteMsgUnix(rest, rights, nil); err != nil {
			return fmt.Errorf("send %s: %w", kind, err)
		}
		if len(files) == 0 {
			break
		}
	}
	if _, err := c.Write(text); err != nil {
		return fmt.Errorf("send %s: %w", kind, err)
	}
	return nil
}

// ErrEnded: the peer has closed the socket, between two messages.
var ErrEnded = errors.New("the peer has ended")

// Receive waits for a message.
func (c *Conn) Receive() (m Message, err error) {
	defer func() {
		if err != nil {
			m.Close()
		}
	}()
	head := make([]byte, headerSize)
	if err := c.readWith(head, &m.Files, true); err != nil {
		return m, err
	}
	size, files := binary.LittleEndian.Uint32(head[4:]), binary.LittleEndian.Uint32(head[8:])
	switch {
	case binary.LittleEndian.Uint32(head) != magic || binary.LittleEndian.Uint32(head[12:]) != 0:
		return m, fmt.Errorf("expected a message, found %q", head)
	case size > MaxBody || files > MaxFiles:
		return m, fmt.Errorf("message of %d bytes with %d descriptors: must be at most %d and %d", size, files, MaxBody, MaxFiles)
	}
	for want := uint32(perCall); want < files; want += perCall {
		if err := c.readWith(head[:1], &m.Files, false); err != nil {
			return m, err
		}
	}
	text := make([]byte, size)
	if err := c.readWith(text, &m.Files, false); err != nil {
		return m, err
	}
	if len(m.Files) != int(files) {
		return m, fmt.Errorf("message with %d descriptors, expected %d", len(m.Files), files)
	}
	var r received
	if err := json.Unmarshal(text, &r); err != nil {
		return m, fmt.Errorf("message: %w", err)
	}
	m.Kind, m.Body = r.Kind, r.Body
	return m, nil
}

// readWith fills p and adds descriptors that come along.
func (c *Conn) readWith(p []byte, files *[]*os.File, first bool) error {
	rights := make([]byte, unix.CmsgSpace(4*(perCall+53)))
	for done := 0; done < len(p); {
		n, oobn, flags, _, err := c.ReadMsgUnix(p[done:], rights)
		if oobn > 0 {
			got, perr := parseRights(rights[:oobn])
			*files = append(*files, got...)
			err = errors.Join(err, perr)
		}
		switch {
		case flags&unix.MSG_CTRUNC != 0:
			return errors.New("receive: too many descriptors at once")
		case len(*files) > MaxFiles:
			return fmt.Errorf("receive: more than %d descriptors", MaxFiles)
		case errors.Is(err, io.EOF), err == nil && n == 0:
			if first && done == 0 {
				return ErrEnded
			}
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		}
		done += n
	}
	return nil
}

func parseRights(b []byte) (files []*os.File, err error) {
	messages, err := unix.ParseSocketControlMessage(b)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		if m.Header.Level != unix.SOL_SOCKET || m.Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return files, err
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "passed"))
		}
	}
	return files, nil
}

// Wait waits until there is something to receive, or the end, or a deadline for reading. It
// reads nothing.
func (c *Conn) Wait() error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR)
	})
}

// Held is a Conn that is read in turns with another process that has the same socket: while
// it is held nothing is taken from it.
type Held struct {
	*Conn
	turn    sync.Mutex // guards held, and is held while a message is received
	held    bool
	changed sync.Cond
}

// NewHeld returns a Held over a Conn.
func NewHeld(c *Conn) *Held {
	h := &Held{Conn: c}
	h.changed.L = &h.turn
	return h
}

// Hold returns when nothing is being received. Nothing will be until Continue.
func (h *Held) Hold() {
	h.turn.Lock()
	defer h.turn.Unlock()
	h.held = true
	_ = h.SetReadDeadline(time.Unix(1, 0)) // on a closed one nobody waits
}

// Continue undoes Hold.
func (h *Held) Continue() {
	h.turn.Lock()
	defer h.turn.Unlock()
	h.held = false
	_ = h.SetReadDeadline(time.Time{})
	h.changed.Broadcast()
}

// Receive is that of Conn, in turn.
func (h *Held) Receive() (Message, error) {
	for {
		err := h.Wait()
		h.turn.Lock()
		if !h.held && !errors.Is(err, os.ErrDeadlineExceeded) {
			defer h.turn.Unlock()
			if err != nil {
				return Message{}, err
			}
			return h.Conn.Receive()
		}
		for h.held {
			h.changed.Wait()
		}
		h.turn.Unlock()
	}
}
