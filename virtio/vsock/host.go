package vsock

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/govmm/govmm/internal/unixsock"
	"golang.org/x/sys/unix"
)

const (
	// connectTime is how long a program of the host may take to send CONNECT.
	connectTime = 10 * time.Second
	// maxCommand is the longest "CONNECT PORT\n", with some spaces.
	maxCommand = 32
)

// greeting is the answer to CONNECT.
func greeting(port uint32) []byte { return fmt.Appendf(nil, "OK %d\n", port) }

// client serves a program of the host that has connected to the device's socket.
// It disconnects the program if there is no connection to make.
func (d *Device) client(host *net.UnixConn) {
	guest, err := readConnect(host)
	d.serving.Lock()
	defer d.serving.Unlock()
	delete(d.clients, host)
	if err != nil || d.closed || !d.active || d.full() {
		_ = host.Close() // the answer
		return
	}
	at := ports{d.nextPort, guest}
	for d.conns[at] != nil {
		at.host = nextPort(at.host)
	}
	d.nextPort = nextPort(at.host)
	c := d.add(at)
	c.host = host
	c.due = dueRequest
	c.limit()
	c.enqueue()
}

// nextPort returns the port after p, from firstPort again after the last one.
func nextPort(p uint32) uint32 {
	if p++; p < firstPort || p == 1<<32-1 { // VMADDR_PORT_ANY
		return firstPort
	}
	return p
}

// readConnect reads "CONNECT PORT\n", byte by byte, because data for the guest
// follows.
func readConnect(host *net.UnixConn) (uint32, error) {
	if err := host.SetReadDeadline(time.Now().Add(connectTime)); err != nil {
		return 0, err
	}
	line := make([]byte, 0, maxCommand)
	for {
		if len(line) == maxCommand {
			return 0, fmt.Errorf("expected CONNECT, got %q and more", line)
		}
		if _, err := io.ReadFull(host, line[len(line):len(line)+1]); err != nil {
			return 0, err
		}
		if line = line[:len(line)+1]; line[len(line)-1] == '\n' {
			break
		}
	}
	word, rest, _ := strings.Cut(string(line), " ")
	if !strings.EqualFold(word, "connect") {
		return 0, fmt.Errorf("expected CONNECT, got %q", line)
	}
	port, err := strconv.ParseUint(strings.TrimSpace(rest), 10, 32)
	if err != nil {
		return 0, err
	}
	return uint32(port), host.SetReadDeadline(time.Time{})
}

// dial connects the guest, which has sent the request h, with a program of the
// host. serving is held.
func (d *Device) dial(h *header) {
	if d.full() {
		d.refuse(h)
		return
	}
	c := d.add(ports{h.DstPort, h.SrcPort})
	c.peerAlloc, c.peerFwd = h.BufAlloc, h.FwdCnt
	c.start(func() {
		host, err := unixsock.Dial(context.Background(), fmt.Sprintf("%s_%d", d.config.Path, c.at.host))
		d.serving.Lock()
		defer d.serving.Unlock()
		switch {
		case err != nil && !c.ended:
			c.reset(false)
		case err == nil && c.ended:
			_ = host.Close() // the guest has ended the connection
		case err == nil:
			c.host = host.(*net.UnixConn)
			c.due |= dueResponse
			c.establish()
			c.enqueue()
		}
	})
}

// read moves what the host's program sends to the guest, a buffer at a time.
func (c *conn) read() {
	buf := make([]byte, readSize)
	for {
		n, err := c.host.Read(buf)
		if !c.wasRead(buf[:n], err) {
			break
		}
		select {
		case <-c.taken:
		case <-c.gone:
			return
		}
	}
	if hungUp(c.host) == nil {
		c.shut(shutBoth)
	}
}

// wasRead takes what was read, and reports whether to read on. An error other
// than io.EOF means that the program is gone.
func (c *conn) wasRead(p []byte, err error) bool {
	c.d.serving.Lock()
	defer c.d.serving.Unlock()
	if len(p) > 0 {
		if c.guestShut&shutReceive == 0 {
			c.out = p
		} else {
			signal(c.taken)
		}
	}
	if err != nil && c.guestShut&shutReceive == 0 {
		c.hostShut |= shutSend
		if !errors.Is(err, io.EOF) {
			c.hostShut |= shutReceive
		}
	}
	c.enqueue()
	return err == nil
}

// shut notes the directions that the host's program has shut down.
func (c *conn) shut(flags uint8) {
	c.d.serving.Lock()
	defer c.d.serving.Unlock()
	c.hostShut |= flags
	c.enqueue()
}

// hungUp waits until the program has closed its end in both directions. It returns
// an error if the connection is closed here first.
func hungUp(host *net.UnixConn) error {
	raw, err := host.SyscallConn()
	if err != nil {
		return err
	}
	// Go's poller reports EPOLLHUP like input.
	return raw.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd)}}
		_, err := unix.Poll(fds, 0)
		return err == nil && fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
	})
}

// write moves what the guest has sent to the host's program.
func (c *conn) write() {
	var spare []byte
	shut := false
	for {
		p, end, more := c.next(spare)
		if len(p) > 0 {
			_, err := c.host.Write(p)
			if !c.wasWritten(err) {
				return
			}
			spare = p[:0]
			continue
		}
		if end && !shut {
			_ = c.host.CloseWrite() // an error: the program is gone
			shut = true
		}
		if !more {
			return
		}
		spare = nil // an idle connection holds no buffer
		select {
		case <-c.fed:
		case <-c.gone:
			if !c.isDraining() {
				return
			}
		}
	}
}

// next takes what is to be written, and leaves spare in its place. It reports
// whether the end is reached, and whether there can be more.
func (c *conn) next(spare []byte) (p []byte, end, more bool) {
	c.d.serving.Lock()
	defer c.d.serving.Unlock()
	if p = c.greeting; p != nil {
		c.greeting = nil
		return p, false, true
	}
	if len(c.in) > 0 {
		p, c.in = c.in, spare
		c.writing = len(p)
		return p, false, true
	}
	return nil, c.guestShut&shutSend != 0, !c.ended
}

func (c *conn) isDraining() bool {
	c.d.serving.Lock()
	defer c.d.serving.Unlock()
	return c.draining
}

// wasWritten reports whether to write on. What could not be written is lost, and
// the guest gets credit for it.
func (c *conn) wasWritten(err error) bool {
	c.d.serving.Lock()
	defer c.d.serving.Unlock()
	c.wrote(uint32(c.writing)) // nothing if it was the greeting
	c.writing = 0
	switch {
	case err != nil && c.ended:
		return false
	case err != nil:
		// The program does not read any more, but it may send.
		c.hostShut |= shutReceive
		c.wrote(uint32(len(c.in)))
		c.in = nil
		if !errors.Is(err, syscall.EPIPE) {
			c.hostShut = shutBoth
		}
	case c.ended && c.draining:
		_ = c.host.SetWriteDeadline(time.Now().Add(drainTime)) // as long as it reads
	}
	c.enqueue()
	return err == nil
}
