package vsock

import (
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/govmm/govmm/internal/unixsock"
)

// ErrInUse: another process listens on the device's socket.
var ErrInUse = unixsock.ErrInUse

// Listen makes the device's socket, for its owner only. It replaces a socket that
// no process listens on; if one does, the error is [ErrInUse]. Another file at
// the path is an error. Listen does nothing if the device listens already.
func (d *Device) Listen() error {
	d.listenMu.Lock()
	defer d.listenMu.Unlock()
	if d.listener != nil {
		return nil
	}
	ln, err := unixsock.Listen(d.config.Path)
	if err != nil {
		return fmt.Errorf("vsock %s: listen: %w", d.config.Path, err)
	}
	d.listener = ln
	d.accepting.Go(func() { d.accept(ln) })
	return nil
}

// Unlisten removes the socket, so that another device can make it. Connections
// stay.
func (d *Device) Unlisten() error {
	d.listenMu.Lock()
	defer d.listenMu.Unlock()
	if d.listener == nil {
		return nil
	}
	err := d.listener.Close()
	d.accepting.Wait()
	d.listener = nil
	if err != nil {
		return fmt.Errorf("vsock %s: stop listening: %w", d.config.Path, err)
	}
	return nil
}

// accept takes connections until the listener is closed.
func (d *Device) accept(ln *unixsock.Listener) {
	for {
		host, err := ln.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			d.log.Warn("accept a connection", "device", "vsock "+d.config.Path, "err", err)
			time.Sleep(100 * time.Millisecond) // probably out of file descriptors
			continue
		}
		d.serving.Lock()
		if d.closed || d.full() {
			_ = host.Close() // the answer
		} else {
			d.clients[host] = true
			d.tasks.Go(func() { d.client(host) })
		}
		d.serving.Unlock()
	}
}
