package serial

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// Backend connects a serial port with the host. Write may block while the other
// end takes no bytes. Close ends a Write and a ReadInput under way.
type Backend interface {
	io.WriteCloser
	Input
}

// Options are the parts of the process that a backend uses. The zero value is
// valid.
type Options struct {
	// Quit is called when the user asks to end the VM (Ctrl-A x on a terminal).
	// The goroutine that reads input calls it, so Quit must not wait for the end
	// of the VM, or close the backend, itself.
	Quit func()
	// The backend stdio uses Stdin, Stdout and Stderr; nil means those of the
	// process. Stderr gets the help text of Ctrl-A h.
	Stdin, Stdout, Stderr *os.File
	// Watcher is the command of a process that calls [WatchTerminal]. The backend stdio
	// starts it when it is opened, so that a terminal in raw mode is restored however
	// this process ends: after a panic, or SIGKILL. nil: it is not, then.
	Watcher []string
}

// OpenBackend makes the backend that spec names:
//
//	stdio      this process's input and output. A terminal is in raw mode from the
//	           first ReadInput until Close; Ctrl-A x quits, Ctrl-A h prints help,
//	           Ctrl-A Ctrl-A sends Ctrl-A. While this process is a background job of
//	           the terminal, or is stopped, the terminal is not raw and is not read
//	file:PATH  output is appended to a file, made with mode 0600; no input. At 64 MiB,
//	           or what file:PATH,max=SIZE says, it becomes PATH.1 and a new one begins
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
	return nil, errSpec(spec)
}

// CheckBackend reports what is wrong with a spec. It opens nothing.
func CheckBackend(spec string) error {
	kind, path, _ := strings.Cut(spec, ":")
	switch {
	case spec == "null", spec == "stdio", kind == "unix" && path != "":
		return nil
	case kind == "file" && path != "":
		_, err := parseFile(path)
		return err
	}
	return errSpec(spec)
}

// Directories returns what the backend of a spec needs of the file system after it was
// opened: directories in which it makes, writes, renames and removes files, and those in
// which it only removes one.
func Directories(spec string) (replace, remove []string) {
	kind, path, _ := strings.Cut(spec, ":")
	if kind == "file" {
		if f, err := parseFile(path); err == nil {
			return []string{filepath.Dir(f.path)}, nil
		}
	}
	if kind == "unix" {
		return nil, []string{filepath.Dir(path)}
	}
	return nil, nil
}

func errSpec(spec string) error {
	return fmt.Errorf("%.80q: expected stdio, file:PATH[,max=SIZE], unix:PATH or null", spec)
}

// null is the backend null.
type null struct{}

func (null) Write(p []byte) (int, error)                    { return len(p), nil }
func (null) ReadInput(context.Context, []byte) (int, error) { return 0, io.EOF }
func (null) Close() error                                   { return nil }
