package serial

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
)

// Backend is what a serial port is connected to on the host. Write may block
// for as long as the other end does not take bytes; Close ends a Write and a
// ReadInput under way.
type Backend interface {
	io.WriteCloser
	Input
}

// Options is what a backend needs of its surroundings. The zero value is fine.
type Options struct {
	// Quit is called when the user asks to end the VM (Ctrl-A x on a
	// terminal), by the goroutine that reads input; it must neither wait for that nor
	// close the backend, but see to it that both happen.
	Quit func()
	// Stdin, Stdout and Stderr are used by backend stdio; nil means those of
	// the process. Stderr gets the help text of Ctrl-A h.
	Stdin, Stdout, Stderr *os.File
}

// OpenBackend makes the backend that spec names:
//
//	stdio      this process's input and output. A terminal goes into raw mode at
//	           the first ReadInput and back at Close; Ctrl-A x quits, Ctrl-A h
//	           helps, Ctrl-A Ctrl-A sends Ctrl-A
//	file:PATH  output is appended to a file, made with mode 0600; no input
//	unix:PATH  a unix socket, mode 0600, that one client at a time may connect to
//	null       output is dropped; no input
func OpenBackend(spec string, opt Options) (Backend, error) {
	kind, path, _ := strings.Cut(spec, ":")
	switch {
	case spec == "null":
		return null{}, nil
	case spec == "stdio":
		return openStdio(opt)
	case kind == "file" && path != "":
		return openFile(path)
	case kind == "unix" && path != "":
		return openUnix(path)
	}
	return nil, fmt.Errorf("serial port %q: use stdio, file:PATH, unix:PATH or null", spec)
}

// null is the backend null.
type null struct{}

func (null) Write(p []byte) (int, error)                    { return len(p), nil }
func (null) ReadInput(context.Context, []byte) (int, error) { return 0, io.EOF }
func (null) Close() error                                   { return nil }

// file is the backend file:PATH. It appends: two ends of a migration may write
// to one file, and an earlier run's output is not the VM's to destroy.
type file struct {
	f *os.File
}

func openFile(path string) (*file, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("serial port to a file: %w", err)
	}
	return &file{f: f}, nil
}

// Write appends to the file.
func (b *file) Write(p []byte) (int, error) { return b.f.Write(p) }

// ReadInput has no input.
func (b *file) ReadInput(context.Context, []byte) (int, error) { return 0, io.EOF }

// Close closes the file.
func (b *file) Close() error { return b.f.Close() }
