package api_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/api"
)

// FuzzServer sends anything as a request to any route: it is answered with JSON, in one
// line if it is an error, and never as a fault of the server.
func FuzzServer(f *testing.F) {
	for _, s := range []string{
		"GET /v1/info HTTP/1.1\r\nHost: h\r\n\r\n",
		"POST /v1/pause HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}",
		"POST /v1/resume HTTP/1.1\r\nHost: h\r\nContent-Length: 14\r\n\r\n{\"force\":true}",
		"PUT /v1/balloon HTTP/1.1\r\nHost: h\r\nContent-Length: 15\r\n\r\n{\"target\":4096}",
		"POST /v1/power-button HTTP/1.1\r\nHost: h\r\nContent-Length: 14\r\n\r\n{\"wait\":\"1ms\"}",
		"POST /v1/dirty-rate HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}",
		"POST /v1/migration?follow=true HTTP/1.1\r\nHost: h\r\nContent-Length: 12\r\n\r\n{\"to\":\"h:1\"}",
		"GET /v1/migration/events HTTP/1.1\r\nHost: h\r\n\r\n",
		"DELETE /v1/migration HTTP/1.1\r\nHost: h\r\n\r\n",
		"POST /v1/migration/estimate HTTP/1.1\r\nHost: h\r\nContent-Length: 12\r\n\r\n{\"to\":\"h:1\"}",
		"GET /v2/x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(raw)))
		if err != nil {
			return // the standard library refuses it
		}
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		defer cancel()
		vm := &fakeVM{}
		w := httptest.NewRecorder()
		api.NewServer[*fakeMigration](vm, "/run/x.sock").Handler().ServeHTTP(w, r.WithContext(ctx))
		if m := vm.Migration(); m != nil {
			m.end(migrate.Result{})
		}
		if w.Code == http.StatusInternalServerError {
			t.Errorf("%q: %d %s", raw, w.Code, w.Body)
		}
		var body struct {
			Detail string `json:"detail"`
		}
		if w.Code >= 400 && (json.Unmarshal(w.Body.Bytes(), &body) != nil || body.Detail == "" || bytes.ContainsAny([]byte(body.Detail), "\n\r")) {
			t.Errorf("%q: %d %q", raw, w.Code, w.Body)
		}
	})
}
