package vsock

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// connectTime is how long a program of the host may take to say CONNECT.
	connectTime = 10 * time.Second
	// maxCommand is the longest "CONNECT PORT\n", with some spaces.
	maxCommand = 32
)

// greeting is the answer to CONNECT.
func greeting(port uint32) []byte { return fmt.Appendf(nil, "OK %d\n", port) }

// client serves a program of the host that has connected to the device's
// socket. One that asks for nothing that there is, is disconnected.
func (d *Device) client(host *net.UnixConn) {
	guest, err := readConnect(host)
	d.serving.Lock()
	defer d.serving.Unlock()
	delete(d.clients, host)
	if err != nil || d.closed || !d.active || d.full() {
		_ = host.Close() // that is the answer
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

// nextPort goes round through the upper ports.
func nextPort(p uint32) uint32 {
	if p++; p < firstPort || p == 1<<32-1 { // VMADDR_PORT_ANY
		return firstPort
	}
	return p
}

// readConnect reads "CONNECT PORT\n", byte by byte: what follows is the
// guest's.
func readConnect(host *net.UnixConn) (uint32, error) {
	if err := host.SetReadDeadline(time.Now().Add(connectTime)); err != nil {
		return 0, err
	}
	line := make([]byte, 0, maxCommand)
	for {
		if len(line) == maxCommand {
			return 0, fmt.Errorf("%q and more: not CONNECT", line)
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
		return 0, fmt.Errorf("%q: not CONNECT", line)
	}
	port, err := strconv.ParseUint(strings.TrimSpace(rest), 10, 32)
	if err != nil {
		return 0, err
	}
	return uint32(port), host.SetReadDeadline(time.Time{})
}

// dial connects the guest, which has sent the request h, to a program of the
// host. serving is held.
func (d *Device) dial(h *header) {
	if d.full() {
		d.refuse(h)
		return
	}
	c := d.add(ports{h.DstPort, h.SrcPort})
	c.peerAlloc, c.peerFwd = h.BufAlloc, h.FwdCnt
	c.start(func() {
		host, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: fmt.Sprintf("%s_%d", d.config.Path, c.at.host), Net: "unix"})
		d.serving.Lock()
		defer d.serving.Unlock()
		switch {
		case err != nil && !c.ended:
			c.reset(false)
		case err == nil && c.ended:
			_ = host.Close() // nothing was written
		case err == nil:
			c.host = host
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

// wasRead says whether to read on. After an error but the end of file the
// program is gone, and there is nothing to wait for.
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

// shut notes what the host's program has shut down.
func (c *conn) shut(flags uint8) {
	c.d.serving.Lock()
	defer c.d.serving.Unlock()
	c.hostShut |= flags
	c.enqueue()
}

// hungUp returns nil when nothing can go either way on the host's side, or an
// error when the connection is closed here.
func hungUp(host *net.UnixConn) error {
	raw, err := host.SyscallConn()
	if err != nil {
		return err
	}
	// The runtime's poller wakes us for EPOLLHUP as for input.
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
			_ = c.host.CloseWrite() // the program reads the end; if it is gone, nobody does
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

// next takes what is to be written, and leaves spare in its place. It says
// whether that is the end, and whether there can be more.
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

// wasWritten says whether to write on. What could not be written is lost, and
// takes up none of the guest's credit either.
func (c *conn) wasWritten(err error) bool {
	c.d.serving.Lock()
	defer c.d.serving.Unlock()
	c.wrote(uint32(c.writing)) // nothing if it was the greeting
	c.writing = 0
	switch {
	case err != nil && c.ended:
		return false
	case err != nil:
		// The program reads no more. It may still send.
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
