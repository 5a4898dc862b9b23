// Package api is the control plane of one virtual machine: HTTP over a unix
// socket that only its owner can open, and the client for it.
//
// The VM's process takes a name with [ClaimName] (or a socket path of its own
// choice with [ClaimSocket]), makes the VM, calls [Claim.Listen] and serves a
// [Controller] with [Server]. The socket appears only when it accepts
// connections. Clients find a VM with [Find], [List] or [Open]. docs/api.md
// lists the routes with what they print.
package api

import (
	"context"
	"errors"
	"iter"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
)

// Controller is what the server drives: one virtual machine. *[vmm.VM] is a
// Controller of *[migrate.Migration]; its methods say what these do. They may be
// called from several goroutines at once. An error that matches [vmm.ErrInvalid]
// is answered with HTTP status 400, one that matches [vmm.ErrState] with 409, any
// other with 500.
type Controller[M Migration] interface {
	Info() vmm.Info
	Pause(ctx context.Context) error
	Resume(ctx context.Context, force bool) error
	Stop(ctx context.Context) error
	PowerOff(ctx context.Context) error
	// Ended is closed when the VM has ended, or the guest has moved away.
	Ended() <-chan struct{}
	Balloon(ctx context.Context) (balloon.Info, error)
	SetBalloon(ctx context.Context, target uint64) error
	StartMigration(address string, opt migrate.Options) (M, error)
	// Migration returns the migration that is under way or was the last; before
	// the first it returns the zero M.
	Migration() M
	// Migrations returns what there is to know about the last migrations, the oldest first.
	Migrations() []vmm.MigrationRecord
	// SameMigration finds the migration of an id, see [vmm.VM.SameMigration].
	SameMigration(address string, opt migrate.Options) (vmm.MigrationRecord, bool, error)
	CheckMigration(ctx context.Context, address string, opt migrate.Options) (migrate.CheckResult, error)
	Stats() vmm.Stats
	// Standing is closed when the guest stands no longer still for a migration; nil: it does not.
	Standing() <-chan struct{}
	Events(ctx context.Context, after uint64, follow bool) (iter.Seq[vmm.Event], error)
	MeasureDirtyRate(ctx context.Context, interval time.Duration) (migrate.DirtyRate, error)
	EstimateMigration(ctx context.Context, address string, opt migrate.Options, interval time.Duration) (migrate.Estimate, error)
}

var _ Controller[*migrate.Migration] = (*vmm.VM)(nil)

// Migration is one migration from here; *[migrate.Migration] implements it.
type Migration interface {
	// Cancel ends it, and the guest goes on here; an error says that it is too
	// late. Cancel does not wait for Done.
	Cancel() error
	// Recover reaches the destination again, where the guest lacks memory that is here; at
	// another address of it, unless that is "".
	Recover(address string) error
	Progress() migrate.Progress
	// Result is final once Done is closed.
	Result() migrate.Result
	Done() <-chan struct{}
}

// controlled is a Controller[M] as a Controller[Migration]: a zero M becomes nil.
type controlled[M interface {
	comparable
	Migration
}] struct{ Controller[M] }

func (c controlled[M]) StartMigration(address string, opt migrate.Options) (Migration, error) {
	m, err := c.Controller.StartMigration(address, opt)
	if err != nil {
		return nil, err
	}
	return m, nil
}

func (c controlled[M]) Migration() Migration {
	var none M
	if m := c.Controller.Migration(); m != none {
		return m
	}
	return nil
}

// Info describes a virtual machine.
type Info struct {
	vmm.Info
	// Socket is the path of the API socket.
	Socket string `json:"api_socket"`
}

// Event is one line of a progress stream. Every line except the last has
// Progress, the last has Result.
type Event struct {
	Progress *migrate.Progress `json:"progress,omitempty"`
	Result   *migrate.Result   `json:"result,omitempty"`
}

// Errors of this package, matched with errors.Is. Those of the VM are
// [vmm.ErrState], [vmm.ErrInvalid] and what comes with them; a client's errors
// match them as the VM's own do.
var (
	// ErrNotFound: there is no such route, or no migration to talk about.
	ErrNotFound = errors.New("not found")
	// ErrNameTaken: another VM has the name.
	ErrNameTaken = errors.New("name taken")
	// ErrSocketInUse: another program uses the socket's path.
	ErrSocketInUse = errors.New("socket in use")
	// ErrNotRunning: no VM of that name, or at that socket, runs.
	ErrNotRunning = errors.New("not running")
	// ErrNoAnswer: the VM's process has the socket open and does not answer.
	ErrNoAnswer = errors.New("no answer")
	// ErrAmbiguous: no name was given and several VMs run.
	ErrAmbiguous = errors.New("several VMs run")
	// ErrLost: the VM's process ended, or closed the connection, before the
	// answer was complete.
	ErrLost = errors.New("connection to the VM lost")
)
