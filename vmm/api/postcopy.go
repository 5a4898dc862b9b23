package api

import (
	"context"
	"fmt"
	"net/http"
	"strconv"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/migrate"
)

// RecoverRequest is the body of POST /v1/migration/recover.
type RecoverRequest struct {
	To string `json:"to,omitempty" doc:"another address of the same destination"`
}

// recoverMigration makes the migration reach its destination again.
func (s *Server) recoverMigration(req RecoverRequest) (*answer[Event], error) {
	if req.To != "" {
		if err := ValidateAddress(req.To); err != nil {
			return nil, err
		}
	}
	m, err := s.migration()
	if err != nil {
		return nil, err
	}
	if err := m.Recover(req.To); err != nil {
		return nil, kind.State("%w", err)
	}
	p := m.Progress()
	return &answer[Event]{Event{Progress: &p}}, nil
}

// Recover makes the migration of a guest that lacks memory reach its destination again, at
// another address of it unless to is "". What comes of it is told by [Client.Follow].
func (c *Client) Recover(ctx context.Context, to string) error {
	return c.call(ctx, http.MethodPost, "/v1/migration/recover", RecoverRequest{To: to}, nil)
}

// ParsePostcopy reads when the guest of a migration moves before all of its memory has:
// "auto", or after so many rounds.
func ParsePostcopy(s string) (int, error) {
	if s == "auto" {
		return migrate.PostcopyAuto, nil
	}
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil || n < 1 {
		return 0, fmt.Errorf("postcopy %.80q: expected auto, or a number of rounds of at least 1", s)
	}
	return int(n), nil
}
