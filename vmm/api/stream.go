package api

import (
	"context"
	"encoding/json"
	"net/http"
	"reflect"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/vmm"
)

const defaultProgressInterval = 200 * time.Millisecond

// ndjson is the content type of streams: one JSON object a line.
const ndjson = "application/x-ndjson"

// streamed is an answer that may be a stream.
type streamed struct {
	Status int
	Body   func(huma.Context)
}

// registerMigration adds migrations away from here.
func (s *Server) registerMigration(a huma.API) {
	event := a.OpenAPI().Components.Schemas.Schema(reflect.TypeFor[Event](), true, "")
	one := func(ct, what string) *huma.Response {
		return &huma.Response{Description: what, Content: map[string]*huma.MediaType{ct: {Schema: event}}}
	}
	start := operation(http.MethodPost, "/v1/migration", "start-migration", "Start a migration; with follow the answer is its progress stream")
	start.Responses = map[string]*huma.Response{"202": one("application/json", "It is under way"), "200": one(ndjson, "Its progress, and in the last line its result")}
	start.DefaultStatus = http.StatusAccepted
	start.Errors = []int{http.StatusBadRequest, http.StatusConflict}
	register(a, start, func(_ context.Context, in *struct {
		Follow bool `query:"follow" doc:"answer with the progress stream"`
		Body   MigrateRequest
	}) (*streamed, error) {
		return s.startMigration(in.Body, in.Follow)
	})
	events := operation(http.MethodGet, "/v1/migration/events", "follow-migration", "The progress stream of the migration that is under way or was the last")
	events.Responses = map[string]*huma.Response{"200": one(ndjson, "Its progress, and in the last line its result")}
	events.Errors = []int{http.StatusNotFound}
	register(a, events, func(context.Context, *struct{}) (*streamed, error) {
		m, err := s.migration()
		if err != nil {
			return nil, err
		}
		return s.follow(m), nil
	})
	register(a, operation(http.MethodGet, "/v1/migration", "get-migration", "Progress of the migration that is under way or was the last, and its result if it has ended"),
		func(context.Context, *struct{}) (*answer[Event], error) { return s.getMigration() })
	cancel := operation(http.MethodDelete, "/v1/migration", "cancel-migration", "Cancel the migration under way; its result comes with the progress stream")
	cancel.DefaultStatus = http.StatusAccepted
	register(a, cancel, func(context.Context, *struct{}) (*answer[Event], error) { return s.cancelMigration() })
	again := operation(http.MethodPost, "/v1/migration/recover", "recover-migration", "Reach the destination again, where the guest lacks memory that is here")
	again.DefaultStatus = http.StatusAccepted
	register(a, again, func(_ context.Context, in *struct{ Body RecoverRequest }) (*answer[Event], error) {
		return s.recoverMigration(in.Body)
	})
}

// startMigration starts a migration. With follow the answer is its progress
// stream, so that a client cannot miss the result of a quick migration.
func (s *Server) startMigration(req MigrateRequest, follow bool) (*streamed, error) {
	opt, err := req.Options()
	if err != nil {
		return nil, err
	}
	if was, ok, err := s.vm.SameMigration(req.To, opt); err != nil {
		return nil, err
	} else if ok && was.Result != nil {
		return &streamed{Body: func(ctx huma.Context) { over(ctx, follow, was) }}, nil
	}
	m, err := s.vm.StartMigration(req.To, opt)
	if err != nil {
		return nil, err
	}
	if follow {
		return s.follow(m), nil
	}
	p := m.Progress()
	return &streamed{Body: func(ctx huma.Context) {
		ctx.SetHeader("Content-Type", "application/json")
		ctx.SetStatus(http.StatusAccepted)
		_ = json.NewEncoder(ctx.BodyWriter()).Encode(Event{Progress: &p}) // a client that left cannot be told
	}}, nil
}

// over answers a request for a migration that has been made, and has ended.
func over(ctx huma.Context, follow bool, was vmm.MigrationRecord) {
	ct, status := "application/json", http.StatusAccepted
	if follow {
		ct, status = ndjson, http.StatusOK
	}
	ctx.SetHeader("Content-Type", ct)
	ctx.SetStatus(status)
	_ = json.NewEncoder(ctx.BodyWriter()).Encode(Event{Result: was.Result}) // a client that left cannot be told
}

// follow answers with the progress stream of a migration.
func (s *Server) follow(m Migration) *streamed {
	return &streamed{Body: func(ctx huma.Context) {
		r, w := humago.Unwrap(ctx)
		s.stream(w, r, m)
	}}
}

// migration returns the VM's last migration, or an error that matches
// ErrNotFound.
func (s *Server) migration() (Migration, error) {
	if m := s.vm.Migration(); m != nil {
		return m, nil
	}
	return nil, kind.Errorf(ErrNotFound, "this VM has not been migrated since its process started")
}

// getMigration answers with the progress and, at the end, the result.
func (s *Server) getMigration() (*answer[Event], error) {
	m, err := s.migration()
	if err != nil {
		return nil, err
	}
	var e Event
	select {
	case <-m.Done():
		res := m.Result()
		e.Result = &res
	default:
	}
	p := m.Progress()
	e.Progress = &p
	return &answer[Event]{e}, nil
}

// cancelMigration cancels; the result comes with the progress stream.
func (s *Server) cancelMigration() (*answer[Event], error) {
	m, err := s.migration()
	if err != nil {
		return nil, err
	}
	select {
	case <-m.Done():
		return nil, kind.State("no migration is under way; the last one: %s", m.Result().Status)
	default:
	}
	if err := m.Cancel(); err != nil {
		return nil, kind.State("%w", err)
	}
	p := m.Progress()
	return &answer[Event]{Event{Progress: &p}}, nil
}

// stream writes one [Event] a line, the first at once, until the migration has
// ended or the client leaves, which does not end the migration.
func (s *Server) stream(w http.ResponseWriter, r *http.Request, m Migration) {
	interval := s.ProgressInterval
	if interval <= 0 {
		interval = defaultProgressInterval
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	line, end := lines(w)
	defer end()
	for {
		p := m.Progress()
		if !line(Event{Progress: &p}) {
			return
		}
		select {
		case <-m.Done():
			res := m.Result()
			line(Event{Result: &res})
			return
		case <-r.Context().Done():
			return
		case <-tick.C:
		}
	}
}
