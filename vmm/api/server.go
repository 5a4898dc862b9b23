package api

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"
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
	abandon context.CancelCauseFunc // ends the contexts of requests
	// ProgressInterval is the time between two lines of a progress stream;
	// 0: 200 ms. It is set before Serve is called.
	ProgressInterval time.Duration
}

// NewServer makes a server for a VM whose API socket has the path socket;
// [Server.Serve] starts it.
func NewServer[M interface {
	comparable
	Migration
}](vm Controller[M], socket string) *Server {
	s := &Server{vm: controlled[M]{vm}, socket: socket}
	ctx, abandon := context.WithCancelCause(context.Background())
	s.abandon = abandon
	s.http = http.Server{
		BaseContext:       func(net.Listener) context.Context { return ctx },
		Handler:           s.routes(),
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
	}
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

// Shutdown takes no more connections and waits for the requests under way, for a
// few seconds at most: the answer to a stop and the last line of a stream are sent
// before the process ends. The VM's migration, if any, must have ended.
func (s *Server) Shutdown() {
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		_ = s.http.Close()
	}
}

// Abandon ends the requests under way with an error, before [Server.Shutdown]: what they wait
// for does not come any more.
func (s *Server) Abandon(why error) { s.abandon(why) }

type handler func(w http.ResponseWriter, r *http.Request) error

// routes dispatches by hand and not with http.ServeMux, so that a wrong path or
// method is answered in JSON like every other error.
func (s *Server) routes() http.Handler {
	table := map[string]map[string]handler{
		"/v1/info":               {http.MethodGet: s.getInfo},
		"/v1/pause":              {http.MethodPost: s.postPause},
		"/v1/resume":             {http.MethodPost: s.postResume},
		"/v1/stop":               {http.MethodPost: s.postStop},
		"/v1/power-button":       {http.MethodPost: s.postPowerButton},
		"/v1/balloon":            {http.MethodGet: s.getBalloon, http.MethodPut: s.putBalloon},
		"/v1/dirty-rate":         {http.MethodPost: s.postDirtyRate},
		"/v1/migration/estimate": {http.MethodPost: s.postEstimate},
		"/v1/migration":          {http.MethodGet: s.getMigration, http.MethodPost: s.postMigration, http.MethodDelete: s.deleteMigration},
		"/v1/migration/events":   {http.MethodGet: s.getEvents},
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		methods, ok := table[r.URL.Path]
		if !ok {
			writeError(w, http.StatusNotFound, errorBody{Error: "no route " + r.URL.Path})
			return
		}
		h, ok := methods[r.Method]
		if !ok {
			allow := make([]string, 0, len(methods))
			for m := range methods {
				allow = append(allow, m)
			}
			slices.Sort(allow)
			w.Header().Set("Allow", strings.Join(allow, ", "))
			writeError(w, http.StatusMethodNotAllowed, errorBody{Error: r.Method + " " + r.URL.Path + ": use " + strings.Join(allow, ", ")})
			return
		}
		if err := h(w, r); err != nil {
			status, body := answer(err)
			writeError(w, status, body)
		}
	})
}

// body decodes the request's body into v within a bounded time. Then it removes
// the deadline: http.Server goes on reading, to notice a client that leaves a
// stream.
func body(w http.ResponseWriter, r *http.Request, v any) error {
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Now().Add(bodyTimeout))
	err := decodeStrict(r.Body, v)
	_ = rc.SetReadDeadline(time.Time{})
	return err
}

func (s *Server) getInfo(w http.ResponseWriter, _ *http.Request) error {
	return writeJSON(w, http.StatusOK, Info{s.vm.Info(), s.socket})
}

func (s *Server) postPause(w http.ResponseWriter, r *http.Request) error {
	return s.act(w, r, &struct{}{}, s.vm.Pause)
}

func (s *Server) postResume(w http.ResponseWriter, r *http.Request) error {
	var req struct {
		Force bool `json:"force"`
	}
	return s.act(w, r, &req, func(ctx context.Context) error { return s.vm.Resume(ctx, req.Force) })
}

func (s *Server) postStop(w http.ResponseWriter, r *http.Request) error {
	return s.act(w, r, &struct{}{}, s.vm.Stop)
}

// act decodes the body into req, calls do and answers with the VM's Info
// afterwards.
func (s *Server) act(w http.ResponseWriter, r *http.Request, req any, do func(context.Context) error) error {
	if err := body(w, r, req); err != nil {
		return err
	}
	if err := do(r.Context()); err != nil {
		return err
	}
	return s.getInfo(w, r)
}

func writeJSON(w http.ResponseWriter, status int, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(data, '\n')) // a client that left cannot be told
	return nil
}

func writeError(w http.ResponseWriter, status int, body errorBody) {
	_ = writeJSON(w, status, body) // a string can always be encoded
}
