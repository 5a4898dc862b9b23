package netproc

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Request asks the process of a network for something. It has all of the state, so that a
// process that is started anew is told everything by one request.
type Request struct {
	// MTU is that of the guest's link, and MAC the guest's address. They are the same in
	// all requests to a process; the guest's frames may have another address.
	MTU uint16
	MAC [6]byte
	// Offloads are the Guest features of virtio-net that the guest accepts.
	Offloads uint64
	// Taken says that the guest runs here: the host's ports of the forwards are taken, and
	// an interface is up.
	Taken bool
}

// Reply answers a Request.
type Reply struct {
	Error string // "": done
}

const (
	// maxMessage is the longest message.
	maxMessage = 16 << 10
	// patience is how long an answer may take.
	patience = 10 * time.Second
)

// Messages is one end of the messages' socket, which keeps their boundaries.
type Messages struct {
	conn   *net.UnixConn
	asking sync.Mutex // is held from a request to its answer
}

// ErrEnd: the process at the other end is gone.
var ErrEnd = errors.New("the other end is gone")

// OpenMessages takes over a descriptor.
func OpenMessages(fd int) (*Messages, error) {
	f := os.NewFile(uintptr(fd), "messages")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("messages: expected a unix socket, found %T", c), c.Close())
	}
	return &Messages{conn: u}, nil
}

// Close closes it.
func (m *Messages) Close() error { return m.conn.Close() }

// Finish tells the process at the other end that nothing more comes, from here or from whom
// the descriptor was passed to, and waits until it has ended.
func (m *Messages) Finish() error {
	err := errors.Join(m.conn.CloseWrite(), m.conn.SetDeadline(time.Now().Add(patience)))
	if err == nil {
		_, err = m.receive(&Reply{}, 0)
	}
	if errors.Is(err, ErrEnd) {
		err = nil
	}
	return errors.Join(err, m.Close())
}

// Descriptor is that of the socket, which stays its own.
func (m *Messages) Descriptor() (fd uintptr, err error) {
	raw, err := m.conn.SyscallConn()
	if err == nil {
		err = raw.Control(func(n uintptr) { fd = n })
	}
	return fd, err
}

// send sends a message, with descriptors.
func (m *Messages) send(message any, fds ...int) error {
	raw, err := json.Marshal(message)
	if err != nil {
		return err
	}
	if len(raw) > maxMessage {
		return fmt.Errorf("a message of %d bytes, expected at most %d", len(raw), maxMessage)
	}
	if len(fds) > 0 {
		_, _, err = m.conn.WriteMsgUnix(raw, unix.UnixRights(fds...), nil)
	} else { // by write, which a vCPU's thread may call: a driver's start asks for offloads there
		_, err = m.conn.Write(raw)
	}
	return err
}

// receive waits for a message, with at most so many descriptors, which the caller closes.
func (m *Messages) receive(message any, descriptors int) (fds []int, err error) {
	p, oob := make([]byte, maxMessage+1), make([]byte, unix.CmsgSpace(4*descriptors))
	n, oobn, _, _, err := m.conn.ReadMsgUnix(p, oob)
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
		return nil, ErrEnd
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			for _, fd := range fds {
				_ = unix.Close(fd)
			}
			fds = nil
		}
	}()
	controls, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, err
	}
	for i := range controls {
		some, err := unix.ParseUnixRights(&controls[i])
		if err != nil {
			return fds, err
		}
		fds = append(fds, some...)
	}
	switch {
	case n > maxMessage:
		return fds, fmt.Errorf("a message of more than %d bytes", maxMessage)
	}
	if err := json.Unmarshal(p[:n], message); err != nil {
		return fds, fmt.Errorf("a message: %w", err)
	}
	return fds, nil
}

// Ask sends a request and waits for its answer.
func (m *Messages) Ask(r Request) error {
	m.asking.Lock()
	defer m.asking.Unlock()
	if err := m.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	var answer Reply
	err := m.send(r)
	if err == nil {
		_, err = m.receive(&answer, 0)
	}
	if err == nil && answer.Error != "" {
		err = errors.New(answer.Error)
	}
	return err
}

// Answer answers requests with what do returns, until the other end is gone.
func (m *Messages) Answer(do func(Request) error) error {
	for {
		var r Request
		if _, err := m.receive(&r, 0); err != nil {
			return err
		}
		var answer Reply
		if err := do(r); err != nil {
			answer.Error = fmt.Sprintf("%.500s", err)
		}
		if err := m.send(answer); err != nil {
			return err
		}
	}
}
