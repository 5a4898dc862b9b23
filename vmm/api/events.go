package api

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"strconv"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
	"github.com/govmm/govmm/vmm"
)

// registerEvents adds the stream of events.
func (s *Server) registerEvents(a huma.API) {
	event := a.OpenAPI().Components.Schemas.Schema(reflect.TypeFor[vmm.Event](), true, "")
	op := operation(http.MethodGet, "/v1/events", "get-events", "What has happened to the VM, one JSON object a line")
	op.Responses = map[string]*huma.Response{"200": {Description: "The events that are kept, and those that come", Content: map[string]*huma.MediaType{ndjson: {Schema: event}}}}
	op.Errors = []int{http.StatusBadRequest}
	register(a, op, func(ctx context.Context, in *struct {
		After  uint64 `query:"after" doc:"only events whose seq is greater"`
		Follow bool   `query:"follow" default:"true" doc:"wait for more until the VM ends"`
	}) (*streamed, error) {
		events, err := s.vm.Events(ctx, in.After, in.Follow)
		if err != nil {
			return nil, err
		}
		return &streamed{Body: func(ctx huma.Context) {
			_, w := humago.Unwrap(ctx)
			line, end := lines(w)
			defer end()
			for e := range events {
				if !line(e) {
					return
				}
			}
		}}, nil
	})
}

// lines begins an answer of one JSON object a line. A client that does not read one within
// lineTimeout is given up. end is called after the last line.
func lines(w http.ResponseWriter) (line func(v any) bool, end func()) {
	rc := http.NewResponseController(w)
	w.Header().Set("Content-Type", ndjson)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	_ = rc.Flush() // the client learns that it is connected
	return func(v any) bool {
		data, err := json.Marshal(v)
		if err != nil {
			return false
		}
		_ = rc.SetWriteDeadline(time.Now().Add(lineTimeout))
		_, err = w.Write(append(data, '\n'))
		return err == nil && rc.Flush() == nil
	}, func() { _ = rc.SetWriteDeadline(time.Time{}) } // for the connection's next request
}

// maxEventLine bounds a line of events, in bytes.
const maxEventLine = 64 << 10

// Events calls do with each event after a number, see [vmm.VM.Events], until there is none
// left, ctx ends or do returns an error, which is returned.
func (c *Client) Events(ctx context.Context, after uint64, follow bool, do func(vmm.Event) error) error {
	resp, err := c.do(ctx, http.MethodGet, "/v1/events?after="+strconv.FormatUint(after, 10)+"&follow="+strconv.FormatBool(follow), nil)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	in := bufio.NewScanner(resp.Body)
	in.Buffer(nil, maxEventLine)
	for in.Scan() {
		var e vmm.Event
		if err := json.Unmarshal(in.Bytes(), &e); err != nil {
			return fmt.Errorf("%s: event: %w", c.socket, err)
		}
		if err := do(e); err != nil {
			return err
		}
	}
	if err := in.Err(); err != nil && err != io.EOF {
		return c.failure(ctx, err)
	}
	return nil
}
