package api

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
	"github.com/govmm/govmm/internal/kind"
)

// answer is the output of an operation whose answer is a JSON object.
type answer[T any] struct{ Body T }

// nothing is the input of an operation that has neither parameters nor fields.
type nothing struct {
	Body *struct{} // {} or no body
}

// operation describes one operation of the API. Its id is unique, and is what clients that
// are made from the document call their method.
func operation(method, path, id, summary string) huma.Operation {
	return huma.Operation{
		Method: method, Path: path, OperationID: id, Summary: summary,
		MaxBodyBytes: maxBody + 1, BodyReadTimeout: -1, // readBody has read it
	}
}

// register adds an operation: do gets the request as a struct, and returns one. What it
// returns as an error is answered as a problem, see problemOf.
func register[I, O any](a huma.API, op huma.Operation, do func(context.Context, *I) (*O, error)) {
	huma.Register(a, op, func(ctx context.Context, in *I) (*O, error) {
		out, err := do(ctx, in)
		if err != nil {
			return nil, problemOf(err)
		}
		return out, nil
	})
}

// routes makes the API: its operations, and the document that describes them.
func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	config := huma.Config{
		OpenAPI: &huma.OpenAPI{
			OpenAPI:    "3.1.0",
			Info:       &huma.Info{Title: "govmm", Version: "1", Description: "The control of one virtual machine, by HTTP over its unix socket. docs/api.md explains it."},
			Components: &huma.Components{Schemas: newRegistry()},
		},
		Formats:                      map[string]huma.Format{"application/json": huma.DefaultJSONFormat, "json": huma.DefaultJSONFormat},
		DefaultFormat:                "application/json",
		RejectUnknownQueryParameters: true,
		Transformers:                 []huma.Transformer{tidy},
	}
	a := huma.NewAPI(config, adapter{humago.NewAdapter(mux, ""), mux})
	s.registerVM(a)
	s.registerGuest(a)
	s.registerMigration(a)
	s.registerMeasurements(a)
	s.registerRecords(a)
	s.registerEvents(a)
	openAnswers(a.OpenAPI())
	serveDocument(mux, a.OpenAPI())
	mux.HandleFunc("GET /v1/console", s.console)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { noRoute(mux, w, r) })
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.RequestURI == "*" || r.URL.Path != path.Clean(r.URL.Path) { // which http.ServeMux answers, or redirects
			noRoute(mux, w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// serveDocument serves what describes the API: OpenAPI 3.1, and 3.0.3 for tools that know no
// later one.
func serveDocument(mux *http.ServeMux, doc *huma.OpenAPI) {
	for path, encode := range map[string]func() ([]byte, error){
		"/v1/openapi.json":     func() ([]byte, error) { return json.Marshal(doc) },
		"/v1/openapi-3.0.json": doc.Downgrade,
	} {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) {
			text, err := encode()
			if err != nil {
				writeProblem(w, err)
				return
			}
			w.Header().Set("Content-Type", "application/openapi+json")
			_, _ = w.Write(append(text, '\n'))
		})
	}
}

// noRoute answers a request for which there is no operation.
func noRoute(mux *http.ServeMux, w http.ResponseWriter, r *http.Request) {
	var allowed []string
	for _, method := range []string{http.MethodDelete, http.MethodGet, http.MethodPost, http.MethodPut} {
		probe := &http.Request{Method: method, URL: r.URL, Host: r.Host}
		if _, pattern := mux.Handler(probe); pattern != "" && pattern != "/" && r.URL.Path == path.Clean(r.URL.Path) {
			allowed = append(allowed, method)
		}
	}
	if allowed == nil {
		writeProblem(w, kind.Errorf(ErrNotFound, "no route %.200s", r.URL.Path))
		return
	}
	methods := strings.Join(allowed, ", ")
	w.Header().Set("Allow", methods)
	writeProblem(w, kind.Errorf(errMethod, "%.20s %.200s: use %s", r.Method, r.URL.Path, methods))
}

// adapter lets huma serve requests whose body was read and is known to be an object.
type adapter struct {
	huma.Adapter
	mux *http.ServeMux
}

// Handle implements [huma.Adapter].
func (a adapter) Handle(op *huma.Operation, handle func(huma.Context)) {
	a.mux.HandleFunc(op.Method+" "+op.Path, func(w http.ResponseWriter, r *http.Request) {
		if err := readBody(w, r); err != nil {
			writeProblem(w, err)
			return
		}
		handle(humago.NewContext(op, r, invalidWriter{w}))
	})
}

// readBody reads the request's body within a bounded time, and puts what it has read in the
// place of the body. Then it removes the deadline: http.Server goes on reading, to notice a
// client that leaves a stream. The body is JSON whatever it is said to be, as curl -d says
// that it is a form.
func readBody(w http.ResponseWriter, r *http.Request) error {
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Now().Add(bodyTimeout))
	data, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	_ = rc.SetReadDeadline(time.Time{})
	if err != nil {
		return kind.Invalid("read the body: %w", err)
	}
	if data, err = checkBody(data); err != nil {
		return err
	}
	r.Body = io.NopCloser(strings.NewReader(string(data)))
	r.Header.Set("Content-Type", "application/json")
	return nil
}

// invalidWriter answers every request that its schema does not allow with the status 400.
type invalidWriter struct{ http.ResponseWriter }

// WriteHeader implements [http.ResponseWriter].
func (w invalidWriter) WriteHeader(status int) {
	if status == http.StatusUnprocessableEntity {
		status = http.StatusBadRequest
	}
	w.ResponseWriter.WriteHeader(status)
}

// Unwrap is for [http.ResponseController].
func (w invalidWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// tidy makes a problem of what huma says of a request that its schema does not allow: all of
// it in one line, without the values, which may be a key.
func tidy(_ huma.Context, _ string, v any) (any, error) {
	e, ok := v.(*huma.ErrorModel)
	if !ok || e.Errors == nil {
		return v, nil
	}
	tidied := huma.ErrorModel{Type: e.Type, Status: e.Status, Detail: e.Detail}
	if tidied.Status == http.StatusUnprocessableEntity {
		tidied.Status = http.StatusBadRequest
	}
	tidied.Title = http.StatusText(tidied.Status)
	var all []string
	for i, one := range e.Errors {
		if i == maxDetails {
			all = append(all, fmt.Sprintf("and %d more", len(e.Errors)-i))
			break
		}
		short := &huma.ErrorDetail{Location: printable(one.Location), Message: printable(one.Message)}
		tidied.Errors = append(tidied.Errors, short)
		all = append(all, short.Location+": "+short.Message)
	}
	if len(all) > 0 {
		tidied.Detail = strings.Join(all, "; ")
	}
	return &tidied, nil
}

// maxDetails bounds what is said of one request.
const maxDetails = 10
