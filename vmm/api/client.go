package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/internal/unixsock"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
	"golang.org/x/sys/unix"
)

// Client talks to one VM.
type Client struct {
	socket string
	http   http.Client
	// Timeout bounds a call that is no stream. Open sets it to 10 s, time enough
	// for a pause under load.
	Timeout time.Duration
}

const callTimeout = 10 * time.Second

// Open returns a client for the VM at a socket path. Each call connects anew, and
// fails with [ErrNotRunning] if no process listens there.
func Open(socket string) *Client {
	c := &Client{socket: socket, Timeout: callTimeout}
	c.http.Transport = &http.Transport{
		DisableKeepAlives: true, // no idle connection keeps the VM's Shutdown waiting
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return unixsock.Dial(ctx, socket)
		},
	}
	return c
}

// Socket returns the path of the VM's socket.
func (c *Client) Socket() string { return c.socket }

// Info describes the VM. A process whose guest has gone on in another one of this host
// (govmm upgrade) may be reached in its last moment: then that one is asked.
func (c *Client) Info(ctx context.Context) (Info, error) {
	i, err := c.info(ctx, http.MethodGet, "/v1/info", nil)
	for range lostRetries {
		if err != nil || i.State != vmm.StateMigrated || i.Migration == nil || i.Migration.Address != vmm.NewProcess {
			break
		}
		select {
		case <-time.After(lostPause):
		case <-ctx.Done():
			return i, nil
		}
		if next, err := c.info(ctx, http.MethodGet, "/v1/info", nil); err == nil {
			i = next
		}
	}
	return i, err
}

// Pause stops the VM's vCPUs, and describes the VM afterwards.
func (c *Client) Pause(ctx context.Context) (Info, error) {
	return c.info(ctx, http.MethodPost, "/v1/pause", nil)
}

// Resume lets them run again; see [vmm.VM.Resume].
func (c *Client) Resume(ctx context.Context, force bool) (Info, error) {
	return c.info(ctx, http.MethodPost, "/v1/resume", map[string]bool{"force": force})
}

// PowerOff presses the power button and waits until the guest has powered off,
// but no longer than wait. The State that it returns is stopped; migrated if the
// guest has moved away meanwhile, and powers off there; or what it was before.
func (c *Client) PowerOff(ctx context.Context, wait time.Duration) (Info, error) {
	var info Info
	err := c.callWithin(ctx, wait+c.Timeout, http.MethodPost, "/v1/power-button", PowerButtonRequest{Wait: Duration(wait)}, &info)
	return info, err
}

// Balloon describes the memory balloon, see [vmm.VM.Balloon].
func (c *Client) Balloon(ctx context.Context) (balloon.Info, error) {
	var b balloon.Info
	err := c.call(ctx, http.MethodGet, "/v1/balloon", nil, &b)
	return b, err
}

// SetBalloon sets how many bytes of the guest's memory the balloon is to hold,
// and describes it afterwards. It does not wait for the guest to follow.
func (c *Client) SetBalloon(ctx context.Context, target uint64) (balloon.Info, error) {
	var b balloon.Info
	err := c.call(ctx, http.MethodPut, "/v1/balloon", BalloonRequest{Target: target}, &b)
	return b, err
}

// Config returns the keys and values of a file from which such a VM is started.
func (c *Client) Config(ctx context.Context) (config map[string]any, err error) {
	err = c.call(ctx, http.MethodGet, "/v1/config", nil, &config)
	return config, err
}

// Stop ends the VM at once.
func (c *Client) Stop(ctx context.Context) (Info, error) {
	return c.info(ctx, http.MethodPost, "/v1/stop", nil)
}

func (c *Client) info(ctx context.Context, method, path string, req any) (Info, error) {
	var info Info
	err := c.call(ctx, method, path, req, &info)
	return info, err
}

// Migrate starts a migration and follows it to its end; see [Client.Follow].
// The end of ctx does not end the migration, [Client.Cancel] does.
func (c *Client) Migrate(ctx context.Context, req MigrateRequest, progress func(migrate.Progress)) (migrate.Result, error) {
	return c.stream(ctx, http.MethodPost, "/v1/migration?follow=true", req, progress)
}

// Follow calls progress, several times a second, until the migration that is
// under way or was the last has ended, and returns its result. An error says that
// the result is not known: it matches [ErrLost] if the VM's process died.
func (c *Client) Follow(ctx context.Context, progress func(migrate.Progress)) (migrate.Result, error) {
	return c.stream(ctx, http.MethodGet, "/v1/migration/events", nil, progress)
}

// Cancel asks the migration under way to end; its result comes through Follow or
// Migrate.
func (c *Client) Cancel(ctx context.Context) error {
	return c.call(ctx, http.MethodDelete, "/v1/migration", nil, nil)
}

// call makes one bounded request and decodes the answer into out.
func (c *Client) call(ctx context.Context, method, path string, req, out any) error {
	return c.callWithin(ctx, c.Timeout, method, path, req, out)
}

func (c *Client) callWithin(ctx context.Context, limit time.Duration, method, path string, req, out any) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := c.callOnce(ctx, method, path, req, out)
	// Another process may listen at the socket now (govmm upgrade). To ask again changes
	// nothing; if nobody listens the process has ended indeed.
	for range lostRetries {
		if method != http.MethodGet || !errors.Is(err, ErrLost) {
			break
		}
		select {
		case <-time.After(lostPause):
		case <-ctx.Done():
			return err
		}
		if again := c.callOnce(ctx, method, path, req, out); !errors.Is(again, ErrNotRunning) {
			err = again
		}
	}
	return err
}

// lostRetries and lostPause are how often, and after which time, a question is asked again
// whose answer was lost.
const (
	lostRetries = 3
	lostPause   = 20 * time.Millisecond
)

func (c *Client) callOnce(ctx context.Context, method, path string, req, out any) error {
	resp, err := c.do(ctx, method, path, req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(out); err != nil {
		return c.failure(ctx, err)
	}
	return nil
}

// maxAnswer bounds an answer and a stream's line, in bytes. A result has one
// entry a round.
const maxAnswer = 64 << 20

func (c *Client) stream(ctx context.Context, method, path string, req any, progress func(migrate.Progress)) (migrate.Result, error) {
	resp, err := c.do(ctx, method, path, req)
	if err != nil {
		return migrate.Result{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	dec := json.NewDecoder(resp.Body)
	for {
		var e Event
		if err := dec.Decode(&e); err != nil {
			return migrate.Result{}, c.failure(ctx, err)
		}
		if e.Result != nil {
			return *e.Result, nil
		}
		if e.Progress != nil && progress != nil {
			progress(*e.Progress)
		}
	}
}

// do sends one request. An answer that is an error becomes one that matches what
// the server's error matched.
func (c *Client) do(ctx context.Context, method, path string, req any) (*http.Response, error) {
	var body io.Reader
	if req != nil {
		data, err := json.Marshal(req)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(data)
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://govmm"+path, body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return nil, c.failure(ctx, err)
	}
	if resp.StatusCode < 300 {
		return resp, nil
	}
	defer func() { _ = resp.Body.Close() }()
	return nil, problemIn(c.socket, resp)
}

// problemIn is the error that an answer has.
func problemIn(socket string, resp *http.Response) error {
	var e problem
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxBody)).Decode(&e); err != nil || e.Detail == "" {
		return fmt.Errorf("%s: expected the answer of a VM, found %q", socket, resp.Status)
	}
	return errorOf(resp.StatusCode, e)
}

// failure says what a transport error means for the user.
func (c *Client) failure(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return kind.Errorf(ErrNotRunning, "no VM runs at %s", c.socket)
	case errors.Is(ctx.Err(), context.DeadlineExceeded), isTimeout(err):
		return kind.Errorf(ErrNoAnswer, "the VM's process at %s does not answer", c.socket)
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return kind.Errorf(ErrLost, "the VM's process ended before it answered")
	}
	return err
}

func isTimeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}

// WaitGone waits until the VM's process has ended or released its [Claim], for
// no longer than Timeout: then the error matches [ErrNoAnswer].
func (c *Client) WaitGone(ctx context.Context) error {
	f, err := os.OpenFile(lockOf(c.socket), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	free := make(chan error, 1)
	go func() { // ends with the VM: flock cannot be interrupted
		free <- flock(f, unix.LOCK_SH)
		_ = f.Close()
	}()
	select {
	case err := <-free:
		return err
	case <-ctx.Done():
		return kind.Errorf(ErrNoAnswer, "the VM's process at %s does not end", c.socket)
	}
}
