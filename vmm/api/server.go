package api

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"golang.org/x/net/netutil"
)

// Limits of one connection.
const (
	headerTimeout   = 5 * time.Second
	bodyTimeout     = 5 * time.Second
	lineTimeout     = 5 * time.Second // to write one line of a stream
	idleTimeout     = 2 * time.Minute
	maxHeaderBytes  = 16 << 10
	shutdownTimeout = 3 * time.Second
)

// Server serves one VM's [Controller].
type Server struct {
	vm      Controller[Migration]
	socket  string
	http    http.Server
	scrapes http.Server             // of ServeMetrics
	abandon context.CancelCauseFunc // ends the contexts of requests
	handler func() http.Handler
	// Upgrade begins an upgrade of the VM's process; nil: it cannot be upgraded. It is set
	// before Serve is called.
	Upgrade func() (Upgrading, error)
	attach  attacher // nil: the VM has no lines to attach to
	// metricsHandler answers GET /metrics; it is made by the first reading.
	metricsHandler func() http.Handler
	// ProgressInterval is the time between two lines of a progress stream;
	// 0: 200 ms. It is set before Serve is called.
	ProgressInterval time.Duration
	// Config returns what GET /v1/config answers: the keys and values of a file from which
	// such a VM is started. nil: there is no such operation. It is set before Serve is called.
	Config func() map[string]any
}

// NewServer makes a server for a VM whose API socket has the path socket;
// [Server.Serve] starts it.
func NewServer[M interface {
	comparable
	Migration
}](vm Controller[M], socket string) *Server {
	s := &Server{vm: controlled[M]{vm}, socket: socket}
	s.attach, _ = vm.(attacher)
	ctx, abandon := context.WithCancelCause(context.Background())
	s.abandon = abandon
	s.handler, s.metricsHandler = sync.OnceValue(s.routes), sync.OnceValue(s.metrics)
	s.http = http.Server{
		BaseContext:       func(net.Listener) context.Context { return ctx },
		Handler:           s.polite(s.serve),
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
	}
	s.scrapes = http.Server{Handler: s.polite(s.MetricsHandler().ServeHTTP), ReadTimeout: headerTimeout, WriteTimeout: bodyTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeaderBytes}
	return s
}

// Serve answers requests until Shutdown is called, and then returns nil. It
// closes ln.
func (s *Server) Serve(ln net.Listener) error {
	if err := s.http.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// maxMetricsConns bounds the connections of ServeMetrics.
const maxMetricsConns = 32

// ServeMetrics answers GET /metrics, and nothing else, until Shutdown is called. It closes ln.
func (s *Server) ServeMetrics(ln net.Listener) error {
	if err := s.scrapes.Serve(netutil.LimitListener(ln, maxMetricsConns)); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Shutdown takes no more connections and waits for the requests under way, for a
// few seconds at most: the answer to a stop and the last line of a stream are sent
// before the process ends. The VM's migration, if any, must have ended.
func (s *Server) Shutdown() {
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		_ = s.http.Close()
	}
	_ = s.scrapes.Close()
}

// Abandon ends the requests under way with an error, before [Server.Shutdown]: what they wait
// for does not come any more.
func (s *Server) Abandon(why error) { s.abandon(why) }

// serve answers one request. What it takes is made by the first request that needs it: a VM
// that is only listed (govmm ps) does not pay half a MiB for it.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodGet && r.URL.Path == "/v1/info" && r.URL.RawQuery == "" && r.ContentLength == 0 {
		out, _ := s.info()
		w.Header().Set("Content-Type", "application/json")
		_ = huma.DefaultJSONFormat.Marshal(w, out.Body) // a client that left cannot be told
		return
	}
	if r.Method == http.MethodPost && r.URL.Path == upgradePath {
		if err := s.postUpgrade(w, r); err != nil {
			writeProblem(w, err)
		}
		return
	}
	if r.URL.Path == metricsPath && r.Method == http.MethodGet {
		s.metricsHandler().ServeHTTP(w, r)
		return
	}
	s.handler().ServeHTTP(w, r)
}
