package api

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/govmm/govmm/internal/unixsock"
)

// listTimeout bounds what one VM may take to say what it is.
const listTimeout = 2 * time.Second

// Entry is one VM that runs.
type Entry struct {
	Name   string
	Client *Client
	Info   Info
	Err    error // why Info is missing: the process runs and does not answer
}

// List returns the VMs that run and have their socket in dir, by name. Sockets
// that processes left behind when they died are passed over.
func List(ctx context.Context, dir string) ([]Entry, error) {
	names, err := names(dir)
	if err != nil {
		return nil, err
	}
	entries := make([]Entry, len(names))
	var wg sync.WaitGroup
	for i, name := range names {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, listTimeout)
			defer cancel()
			c := Open(socketIn(dir, name))
			info, err := c.Info(ctx)
			entries[i] = Entry{Name: name, Client: c, Info: info, Err: err}
		})
	}
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(entries, func(e Entry) bool {
		return errors.Is(e.Err, ErrNotRunning) || errors.Is(e.Err, ErrLost)
	}), nil
}

// names lists the VMs that have a socket in dir, stale ones too. No such
// directory: no VMs.
func names(dir string) ([]string, error) {
	files, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := checkOwner(dir); err != nil {
		return nil, err
	}
	var names []string
	for _, f := range files {
		name, ok := strings.CutSuffix(f.Name(), socketSuffix)
		if ok && f.Type() == fs.ModeSocket && ValidateName(name) == nil {
			names = append(names, name)
		}
	}
	return names, nil
}

// Find returns a client for the VM of that name in dir. An empty name means
// the only VM that runs; those whose state is in passOver, and those that are
// just ending, do not count if there are others. The error matches
// [ErrNotRunning] or [ErrAmbiguous].
func Find(ctx context.Context, dir, name string, passOver ...string) (*Client, error) {
	if name == "" {
		return findOnly(ctx, dir, passOver)
	}
	if err := ValidateName(name); err != nil {
		return nil, err
	}
	if err := checkOwner(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	socket := socketIn(dir, name)
	conn, err := unixsock.Dial(ctx, socket)
	switch {
	case err == nil:
		_ = conn.Close()
		return Open(socket), nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return nil, &kindError{ErrNotRunning, fmt.Sprintf("no VM named %q runs", name)}
	}
	return nil, err
}

func findOnly(ctx context.Context, dir string, passOver []string) (*Client, error) {
	entries, err := List(ctx, dir)
	if err != nil {
		return nil, err
	}
	// One that has ended, or whose guest has moved away, is still there for a
	// moment: nobody means that one.
	living := slices.DeleteFunc(slices.Clone(entries), func(e Entry) bool {
		return e.Info.State == "migrated" || e.Info.State == "stopped" || slices.Contains(passOver, e.Info.State)
	})
	if len(living) > 0 {
		entries = living
	}
	switch len(entries) {
	case 0:
		return nil, &kindError{ErrNotRunning, "no VM runs"}
	case 1:
		return entries[0].Client, nil
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name
	}
	return nil, &kindError{ErrAmbiguous, fmt.Sprintf("%d VMs run: %s", len(names), strings.Join(names, ", "))}
}
