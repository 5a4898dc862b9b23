package api

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/internal/unixsock"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/serial"
)

// consoleProtocol is what a connection is upgraded to (RFC 9110, section 7.8): bytes of one
// of the VM's lines, both ways.
const consoleProtocol = "govmm-console"

// lastBytes is how long a client may take for the last output of a VM that ends.
const lastBytes = 2 * time.Second

// attacher is a [Controller] whose lines can be joined.
type attacher interface {
	Attach(line string, write bool) (*serial.Viewer, error)
}

var _ attacher = (*vmm.VM)(nil)

// console serves GET /v1/console, which is not in the document: OpenAPI has no words for
// what follows the upgrade.
func (s *Server) console(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Upgrade") != consoleProtocol {
		writeProblem(w, kind.Invalid("/v1/console: expected a request with Connection: Upgrade and Upgrade: %s", consoleProtocol))
		return
	}
	q := r.URL.Query()
	line := q.Get("line")
	if line == "" {
		line = vmm.LineSerial
	}
	if s.attach == nil {
		writeProblem(w, kind.Errorf(ErrNotFound, "this VM's lines cannot be attached to"))
		return
	}
	v, err := s.attach.Attach(line, q.Get("write") == "true")
	if err != nil {
		writeProblem(w, err)
		return
	}
	defer func() { _ = v.Close() }()
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		writeProblem(w, err)
		return
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Time{})
	if _, err := fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", consoleProtocol); err != nil {
		return
	}
	go func() {
		_, _ = io.Copy(v, buffered.Reader) // until the client leaves; its input is refused if it may not write
		_ = v.Close()
	}()
	// A client that does not read must not keep the process when the VM has ended.
	defer context.AfterFunc(endOf(v), func() { _ = conn.SetWriteDeadline(time.Now().Add(lastBytes)) })()
	_, _ = io.Copy(conn, v)
}

// endOf is a context that ends when a viewer does.
func endOf(v *serial.Viewer) context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		<-v.Gone()
		cancel()
	}()
	return ctx
}

// Console joins one of the VM's lines, see [vmm.VM.Attach]: what is read is the guest's
// output, what is written its input. It ends with the VM.
func (c *Client) Console(ctx context.Context, line string, write bool) (net.Conn, error) {
	conn, err := unixsock.Dial(ctx, c.socket)
	if err != nil {
		return nil, c.failure(ctx, err)
	}
	query := url.Values{"line": {line}}
	if write {
		query.Set("write", "true")
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://govmm/v1/console?"+query.Encode(), nil)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", consoleProtocol)
	_ = conn.SetDeadline(time.Now().Add(c.Timeout))
	if err := req.Write(conn); err != nil {
		return nil, errors.Join(c.failure(ctx, err), conn.Close())
	}
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, req)
	if err != nil {
		return nil, errors.Join(c.failure(ctx, err), conn.Close())
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		err = problemIn(c.socket, resp)
		return nil, errors.Join(err, resp.Body.Close(), conn.Close())
	}
	_ = conn.SetDeadline(time.Time{})
	return consoleConn{conn, in}, nil
}

// consoleConn is a connection of which some was read already.
type consoleConn struct {
	net.Conn
	in *bufio.Reader
}

func (c consoleConn) Read(p []byte) (int, error) { return c.in.Read(p) }
