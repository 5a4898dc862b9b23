package api

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/internal/unixsock"
)

const (
	// upgradeProtocol is what a connection of the API is turned into by POST /v1/upgrade.
	upgradeProtocol = "govmm-take-over"
	upgradePath     = "/v1/upgrade"
	memoryHeader    = "Govmm-Memory"
)

// Upgrading is an upgrade that has begun: the process that is to take the guest over has not
// come yet.
type Upgrading struct {
	// Adopt takes over the connection that leads to that process; nil: it does not come.
	Adopt func(*net.UnixConn)
	// Shared says that the guest's memory is not copied.
	Shared bool
}

// postUpgrade begins an upgrade, and makes the connection the one to the process that takes
// the guest over. How it goes is told as of a migration.
func (s *Server) postUpgrade(w http.ResponseWriter, r *http.Request) error {
	if s.Upgrade == nil {
		return kind.State("the process of this VM cannot be upgraded")
	}
	if r.Header.Get("Upgrade") != upgradeProtocol {
		return kind.Invalid("upgrade: expected the header Upgrade: %s, found %.80q", upgradeProtocol, r.Header.Get("Upgrade"))
	}
	if r.ContentLength != 0 {
		return kind.Invalid("upgrade: expected no body")
	}
	u, err := s.Upgrade()
	if err != nil {
		return err
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		u.Adopt(nil)
		return err
	}
	c := unixsock.Bare(conn)
	if c == nil || buffered.Reader.Buffered() > 0 {
		u.Adopt(nil)
		return errors.Join(errors.New("upgrade: expected a unix socket, and nothing after the request"), conn.Close())
	}
	memory := "sent"
	if u.Shared {
		memory = "shared"
	}
	_ = c.SetDeadline(time.Now().Add(lineTimeout))
	_, err = fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n%s: %s\r\n\r\n", upgradeProtocol, memoryHeader, memory)
	if err != nil {
		_ = c.Close()
		u.Adopt(nil)
		return nil // there is nobody to tell
	}
	_ = c.SetDeadline(time.Time{})
	u.Adopt(c)
	return nil
}

// Upgrade begins to let the VM's guest go on in another process, which is given the
// connection. [Client.Follow] tells how it goes. shared says that the guest's memory is not
// copied.
func (c *Client) Upgrade(ctx context.Context) (conn *net.UnixConn, shared bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	nc, err := unixsock.Dial(ctx, c.socket)
	if err != nil {
		return nil, false, c.failure(ctx, err)
	}
	defer func() {
		if err != nil {
			_ = nc.Close()
		}
	}()
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })
	_, err = fmt.Fprintf(nc, "POST "+upgradePath+" HTTP/1.1\r\nHost: govmm\r\nConnection: Upgrade\r\nUpgrade: %s\r\nContent-Length: 0\r\n\r\n", upgradeProtocol)
	if err != nil {
		return nil, false, c.failure(ctx, err)
	}
	br := bufio.NewReader(io.LimitReader(nc, maxBody)) // the other side says nothing more before it is spoken to
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		return nil, false, c.failure(ctx, err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		defer func() { _ = resp.Body.Close() }()
		if resp.StatusCode == http.StatusNotFound {
			return nil, false, kind.State("the process of this VM is of a version that cannot be upgraded in place; migrate it instead")
		}
		var e problem
		if err := json.NewDecoder(io.LimitReader(resp.Body, maxBody)).Decode(&e); err != nil || e.Detail == "" {
			return nil, false, fmt.Errorf("%s: expected the answer of a VM, found %q", c.socket, resp.Status)
		}
		return nil, false, errorOf(resp.StatusCode, e)
	}
	u, ok := nc.(*net.UnixConn)
	if !stop() || !ok || br.Buffered() > 0 {
		return nil, false, fmt.Errorf("%s: expected a connection for the new process", c.socket)
	}
	return u, resp.Header.Get(memoryHeader) == "shared", nil
}
