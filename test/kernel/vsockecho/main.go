// Command vsockecho uses AF_VSOCK in a guest, through the guest kernel's own driver. It
// reports on standard output:
//
//	vsockecho listen PORT	sends back what it gets, one connection at a time
//	vsockecho dial PORT WORD	says WORD to that port of the host, and reads a line
package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	_ "github.com/govmm/govmm/internal/supported" // Linux on x86-64 only
	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Println("vsockecho:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return errors.New("vsockecho listen PORT | dial PORT WORD")
	}
	port, err := strconv.ParseUint(args[1], 10, 32)
	if err != nil {
		return err
	}
	s, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	switch {
	case args[0] == "listen":
		return listen(s, uint32(port))
	case args[0] == "dial" && len(args) == 3:
		return dial(s, uint32(port), args[2])
	}
	return fmt.Errorf("%q is neither listen nor dial", args[0])
}

// listen serves connections until accept fails.
func listen(s int, port uint32) error {
	if err := unix.Bind(s, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port}); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	if err := unix.Listen(s, 8); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	fmt.Println("vsockecho: listening on", port)
	for {
		c, from, err := unix.Accept(s)
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		go func() {
			cid := uint32(0)
			if a, ok := from.(*unix.SockaddrVM); ok {
				cid = a.CID
			}
			fmt.Println("vsockecho: connection from CID", cid)
			fmt.Println("vsockecho: connection ends:", echo(c))
			_ = unix.Close(c)
		}()
	}
}

// echo returns why it ends, never nil.
func echo(c int) error {
	p := make([]byte, 4096)
	for {
		n, err := unix.Read(c, p)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		case n == 0:
			return errors.New("the other end has closed it")
		}
		for rest := p[:n]; len(rest) > 0; {
			n, err := unix.Write(c, rest)
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return err
			}
			rest = rest[n:]
		}
	}
}

// dial connects to the host, CID 2.
func dial(s int, port uint32, word string) error {
	if err := unix.Connect(s, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: port}); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	if _, err := unix.Write(s, []byte(word+"\n")); err != nil {
		return err
	}
	p := make([]byte, 256)
	n, err := unix.Read(s, p)
	if err != nil {
		return err
	}
	fmt.Printf("vsockecho: the host says %q\n", p[:n])
	return unix.Close(s)
}
