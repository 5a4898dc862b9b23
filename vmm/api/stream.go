package api

import (
	"encoding/json"
	"net/http"
	"time"

	"github.com/govmm/govmm/internal/kind"
)

const defaultProgressInterval = 200 * time.Millisecond

// postMigration starts a migration. With ?follow=true the answer is its progress
// stream, so that a client cannot miss the result of a quick migration.
func (s *Server) postMigration(w http.ResponseWriter, r *http.Request) error {
	follow, err := flagParam(r, "follow")
	if err != nil {
		return err
	}
	var req MigrateRequest
	if err := body(w, r, &req); err != nil {
		return err
	}
	opt, err := req.Options()
	if err != nil {
		return err
	}
	m, err := s.vm.StartMigration(req.To, opt)
	if err != nil {
		return err
	}
	if follow {
		s.stream(w, r, m)
		return nil
	}
	p := m.Progress()
	return writeJSON(w, http.StatusAccepted, Event{Progress: &p})
}

func flagParam(r *http.Request, name string) (bool, error) {
	switch v := r.URL.Query().Get(name); v {
	case "", "false":
		return false, nil
	case "true":
		return true, nil
	default:
		return false, kind.Invalid("%s: expected true or false, found %.80q", name, v)
	}
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
func (s *Server) getMigration(w http.ResponseWriter, _ *http.Request) error {
	m, err := s.migration()
	if err != nil {
		return err
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
	return writeJSON(w, http.StatusOK, e)
}

// deleteMigration cancels; the result comes with the progress stream.
func (s *Server) deleteMigration(w http.ResponseWriter, _ *http.Request) error {
	m, err := s.migration()
	if err != nil {
		return err
	}
	select {
	case <-m.Done():
		return kind.State("no migration is under way; the last one: %s", m.Result().Status)
	default:
	}
	if err := m.Cancel(); err != nil {
		return kind.State("%w", err)
	}
	p := m.Progress()
	return writeJSON(w, http.StatusAccepted, Event{Progress: &p})
}

// getEvents streams the progress of the migration that is under way or was the
// last.
func (s *Server) getEvents(w http.ResponseWriter, r *http.Request) error {
	m, err := s.migration()
	if err != nil {
		return err
	}
	s.stream(w, r, m)
	return nil
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
	rc := http.NewResponseController(w)
	defer func() { _ = rc.SetWriteDeadline(time.Time{}) }() // for the connection's next request
	line := func(e Event) bool {
		data, err := json.Marshal(e)
		if err != nil {
			return false
		}
		_ = rc.SetWriteDeadline(time.Now().Add(lineTimeout))
		_, err = w.Write(append(data, '\n'))
		return err == nil && rc.Flush() == nil
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("Cache-Control", "no-store")
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
