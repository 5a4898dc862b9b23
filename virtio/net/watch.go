package net

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// linkWatch tells when something about the interfaces of a network namespace has
// changed (rtnetlink(7), RTNLGRP_LINK).
type linkWatch struct {
	file  *os.File
	ended chan struct{}
}

// watchLinks calls changed after each change, until it is closed. It is of the network
// namespace of the calling thread.
func watchLinks(changed func()) (*linkWatch, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("watch the host's interfaces: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_LINK}); err != nil {
		return nil, errors.Join(fmt.Errorf("watch the host's interfaces: %w", err), unix.Close(fd))
	}
	w := &linkWatch{os.NewFile(uintptr(fd), "netlink"), make(chan struct{})}
	go w.run(changed)
	return w, nil
}

// run reads what has changed only to be woken up by it: whoever wants to know asks.
func (w *linkWatch) run(changed func()) {
	defer close(w.ended)
	var p [1]byte
	for {
		// ENOBUFS: some news was lost, so there was news.
		if _, err := w.file.Read(p[:]); err != nil && !errors.Is(err, unix.ENOBUFS) {
			return
		}
		changed()
	}
}

// close returns when changed is not being called any more.
func (w *linkWatch) close() error {
	err := w.file.Close()
	<-w.ended
	return err
}
