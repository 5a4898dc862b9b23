// Package api is the control plane of one virtual machine: HTTP over a unix
// socket that only its owner can open, and the client for it.
//
// The VM's process takes a name with [ClaimName] (or a socket of its own
// choice with [ClaimSocket]), builds the machine, calls [Claim.Listen] and
// serves a [Controller] with [Server]: a socket that can be seen answers.
// Clients find a VM with [Find], [List] or [Open]. docs/api.md lists the
// routes with what they print.
package api

import (
	"context"
	"errors"
	"time"

	"github.com/govmm/govmm/migrate"
)

// Controller is what the server drives: one virtual machine. Its methods may
// be called from several goroutines at once. An error that matches [ErrState]
// says that the machine's state does not allow the call (HTTP 409), one that
// matches [ErrInvalid] that the request is at fault (400); any other is a
// failure of the machine (500).
type Controller interface {
	// Info describes the machine as it is now.
	Info() Info
	// Pause stops the vCPUs; it returns when none runs.
	Pause() error
	// Resume lets them run. force overrides the refusal after a COMMIT whose
	// outcome is unknown: the guest may then run twice.
	Resume(force bool) error
	// Stop ends the machine at once, as pulling the plug would.
	Stop() error
	// PowerOff presses the guest's power button and returns at once.
	PowerOff() error
	// Ended is closed when the machine has ended, or the guest has moved away.
	Ended() <-chan struct{}
	// Balloon describes the memory balloon, with fresh statistics if the guest
	// gives any.
	Balloon(ctx context.Context) (Balloon, error)
	// SetBalloon says how many bytes of guest memory the balloon shall hold.
	SetBalloon(target uint64) error
	// StartMigration begins to move the guest to addr ("host:port") and
	// returns without waiting.
	StartMigration(addr string, opt migrate.Options) (Migration, error)
	// MeasureDirtyRate watches for an interval what the guest writes.
	MeasureDirtyRate(ctx context.Context, interval time.Duration) (migrate.DirtyRate, error)
	// EstimateMigration foretells what a migration to addr would take.
	EstimateMigration(ctx context.Context, addr string, opt migrate.Options, interval time.Duration) (migrate.Estimate, error)
	// Migration returns the migration that runs or was the last to run, and
	// nil before the first.
	Migration() Migration
}

// Migration is one outgoing migration; [migrate.Migration] implements it.
type Migration interface {
	// Cancel ends it, the guest goes on here; an error says that it is too
	// late. It does not wait: Done does.
	Cancel() error
	Progress() migrate.Progress
	// Result is final once Done is closed.
	Result() migrate.Result
	Done() <-chan struct{}
}

// Info describes a virtual machine.
type Info struct {
	Name  string `json:"name"`
	PID   int    `json:"pid"`
	State string `json:"state"` // running, paused, panicked, receiving, migrating, migrated, handoff-unknown, stopped
	// Address is where a receiver listens ("host:port"), else empty.
	Address string `json:"address"`
	CPUs    int    `json:"cpus"`   // 0: not known yet (a receiver that waits)
	Memory  uint64 `json:"memory"` // guest memory in bytes; 0: not known yet
	// Kernel is "demo guest", "ELF" or "bzImage"; empty: not known yet.
	Kernel string `json:"kernel,omitempty"`
	// Panicked says that the guest's kernel told that it panicked, whatever the
	// state is.
	Panicked bool `json:"panicked,omitempty"`
	// Devices are those of virtio; nil: not known yet.
	Devices *Devices `json:"devices,omitempty"`
	// Socket is the path of the API socket.
	Socket string `json:"api_socket"`
	// Migration is the outgoing migration that runs or ran last.
	Migration *migrate.Progress `json:"migration,omitempty"`
	// Incoming is what a receiver has got of the migration that is under way.
	Incoming *migrate.ReceiveProgress `json:"incoming,omitempty"`
}

// Event is one line of a progress stream. Every line but the last has
// Progress, the last has Result.
type Event struct {
	Progress *migrate.Progress `json:"progress,omitempty"`
	Result   *migrate.Result   `json:"result,omitempty"`
}

// Errors that callers can tell apart with errors.Is.
var (
	// ErrState: the machine's state does not allow the call.
	ErrState = errors.New("not possible in this state")
	// ErrInvalid: the request is at fault.
	ErrInvalid = errors.New("invalid request")
	// ErrNotFound: no such route, or nothing there to talk about.
	ErrNotFound = errors.New("not found")
	// ErrNameTaken: another VM has the name.
	ErrNameTaken = errors.New("name taken")
	// ErrSocketInUse: somebody answers on the socket.
	ErrSocketInUse = errors.New("socket in use")
	// ErrNotRunning: no VM of that name, or none at that socket, runs.
	ErrNotRunning = errors.New("not running")
	// ErrNoAnswer: the VM's process has the socket open and does not reply.
	ErrNoAnswer = errors.New("no answer")
	// ErrAmbiguous: no name was given and several VMs run.
	ErrAmbiguous = errors.New("several VMs run")
	// ErrLost: the VM's process ended, or closed the connection, before the
	// answer was complete.
	ErrLost = errors.New("connection to the VM lost")
)

// kindError is an error with a message of its own that matches a sentinel: the
// sentinel's words are not repeated in front of the reason.
type kindError struct {
	kind error
	msg  string
}

func (e *kindError) Error() string        { return e.msg }
func (e *kindError) Is(target error) bool { return target == e.kind }
