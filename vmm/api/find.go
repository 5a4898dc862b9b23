package api

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/internal/unixsock"
	"github.com/govmm/govmm/vmm"
	"golang.org/x/sys/unix"
)

// listTimeout bounds how long List waits for the answer of one VM.
const listTimeout = 2 * time.Second

// Entry is one VM that runs.
type Entry struct {
	Name   string
	Client *Client
	Info   Info
	Err    error // why Info is missing: the process runs and does not answer
}

// List returns the VMs that run and have their socket in dir, sorted by name. It
// skips the sockets that dead processes have left. Root, in its own directory, sees those of
// units ([UnitDirectory]), too.
func List(ctx context.Context, dir string) ([]Entry, error) {
	var entries []Entry
	for _, dir := range seenFrom(dir) {
		names, err := names(dir)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			entries = append(entries, Entry{Name: name, Client: Open(socketIn(dir, name))})
		}
	}
	slices.SortStableFunc(entries, func(a, b Entry) int { return strings.Compare(a.Name, b.Name) })
	var wg sync.WaitGroup
	for i := range entries {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, listTimeout)
			defer cancel()
			e := &entries[i]
			e.Info, e.Err = e.Client.Info(ctx)
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

// names lists the VMs that have a socket in dir, also a stale one. If there is no
// such directory there are none.
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

// Find returns a client for the VM of that name in dir, or of a unit as in [List]. An empty name means the
// only VM that runs; those whose state is in skip, and those that are just ending,
// do not count if there are others. If there is not exactly one the error matches
// [ErrNotRunning] or [ErrAmbiguous].
func Find(ctx context.Context, dir, name string, skip ...vmm.State) (*Client, error) {
	if name == "" {
		return findOnly(ctx, dir, skip)
	}
	if err := ValidateName(name); err != nil {
		return nil, err
	}
	for _, dir := range seenFrom(dir) {
		if err := checkOwner(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		socket := socketIn(dir, name)
		conn, err := unixsock.Dial(ctx, socket)
		if err == nil {
			_ = conn.Close()
			return Open(socket), nil
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ECONNREFUSED) {
			return nil, err
		}
	}
	return nil, kind.Errorf(ErrNotRunning, "no VM named %q runs", name)
}

func findOnly(ctx context.Context, dir string, skip []vmm.State) (*Client, error) {
	entries, err := List(ctx, dir)
	if err != nil {
		return nil, err
	}
	// A VM that has ended, or whose guest has moved away, still answers for a
	// moment.
	skip = append(skip[:len(skip):len(skip)], vmm.StateMigrated, vmm.StateStopped)
	living := slices.DeleteFunc(slices.Clone(entries), func(e Entry) bool { return slices.Contains(skip, e.Info.State) })
	if len(living) > 0 {
		entries = living
	}
	switch len(entries) {
	case 0:
		return nil, kind.Errorf(ErrNotRunning, "no VM runs")
	case 1:
		return entries[0].Client, nil
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name
	}
	return nil, kind.Errorf(ErrAmbiguous, "%d VMs run: %s", len(names), strings.Join(names, ", "))
}
