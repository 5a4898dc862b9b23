package main

import (
	"fmt"
	"net"
	"os"
)

// notifier tells the service manager what this process does (sd_notify(3)): READY=1 when the
// guest's first instruction may run or a receiver listens, MAINPID= at an upgrade, STOPPING=1
// when the guest is gone; nil: there is none. The socket is open before the process goes into
// the sandbox, and is passed to the process of an upgrade, both of which a library that opens it
// for each message could not do.
type notifier struct{ socket *os.File }

// newNotifier opens the socket of $NOTIFY_SOCKET.
func newNotifier() (*notifier, error) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil, nil
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"}) // @NAME is an abstract one
	if err != nil {
		return nil, fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	defer c.Close()
	f, err := c.File()
	if err != nil {
		return nil, fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	return &notifier{f}, nil
}

// say sends a message. A manager that does not listen any more misses it.
func (n *notifier) say(text string) {
	if n != nil {
		_, _ = n.socket.WriteString(text)
	}
}
