package api

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"
	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/vmm"
)

// Migrations are the last migrations from a VM, the oldest first.
type Migrations struct {
	Migrations []vmm.MigrationRecord `json:"migrations" nullable:"false"`
}

// registerRecords adds what tells of migrations after their end too.
func (s *Server) registerRecords(a huma.API) {
	register(a, operation(http.MethodGet, "/v1/migrations", "list-migrations", "The last migrations from here, 16 at most, the oldest first"),
		func(context.Context, *struct{}) (*answer[Migrations], error) {
			all := s.vm.Migrations()
			if all == nil {
				all = []vmm.MigrationRecord{}
			}
			return &answer[Migrations]{Migrations{all}}, nil
		})
	register(a, operation(http.MethodGet, "/v1/migrations/{id}", "get-migration-record", "One migration, under way or ended"),
		func(_ context.Context, in *struct {
			ID string `path:"id" maxLength:"64"`
		}) (*answer[vmm.MigrationRecord], error) {
			for _, r := range s.vm.Migrations() {
				if r.ID == in.ID {
					return &answer[vmm.MigrationRecord]{r}, nil
				}
			}
			return nil, kind.Errorf(ErrNotFound, "no migration %q; the process of a VM remembers the last 16", printable(in.ID))
		})
}

// Migrations returns the last migrations from the VM, the oldest first.
func (c *Client) Migrations(ctx context.Context) ([]vmm.MigrationRecord, error) {
	var all Migrations
	err := c.call(ctx, http.MethodGet, "/v1/migrations", nil, &all)
	return all.Migrations, err
}
