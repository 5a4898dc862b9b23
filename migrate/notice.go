package migrate

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"

	"github.com/govmm/govmm/migrate/report"
	"golang.org/x/sys/unix"
)

// Notice is a step of an outgoing migration, see [Options.Notify].
type Notice struct {
	Phase  Phase
	Round  RoundStats // the round that has ended; N is 0 if none has, and in the one before the first
	Reason Reason     // with the last phase: why it did not complete
	Error  string     // likewise
}

// tell needs mu.
func (m *meter) tell(n Notice) {
	if m.notify != nil {
		m.notify(n)
	}
}

// RefusedError is a destination that does not take the guest. It matches [ErrRefused].
type RefusedError struct {
	Reasons []string // all that it has found, each one line
}

// Error lists the reasons in one line.
func (e *RefusedError) Error() string {
	return ErrRefused.Error() + ": " + strings.Join(e.Reasons, "; ")
}

// Unwrap returns [ErrRefused].
func (e *RefusedError) Unwrap() error { return ErrRefused }

// endedError is implemented by what a guest that has ended ends its migration with.
type endedError interface{ GuestEnded() bool }

// reasonFor puts an error that ended a migration, in a phase, into one of the reasons.
func reasonFor(err error, phase Phase) Reason {
	var ended endedError
	var gaveUp *failedError
	var network net.Error
	switch {
	case errors.Is(err, ErrHandoffUnknown):
		return report.ReasonHandoffUnknown
	case errors.Is(err, ErrCancelled):
		return report.ReasonCancelled
	case errors.Is(err, ErrTimeout):
		return report.ReasonTimeout
	case errors.Is(err, ErrNotConverged):
		return report.ReasonNotConverged
	case errors.As(err, &ended) && ended.GuestEnded():
		return report.ReasonGuestEnded
	case errors.Is(err, ErrRefused):
		return report.ReasonRefused
	case errors.As(err, &gaveUp) || errors.Is(err, errAborted):
		return report.ReasonGaveUp
	case errors.Is(err, ErrProtocol):
		return report.ReasonProtocol
	case errors.Is(err, errOptions):
		return report.ReasonInvalid
	case phase == PhaseConnecting:
		return report.ReasonUnreachable
	case errors.Is(err, errLostPeer), errors.As(err, &network), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, os.ErrDeadlineExceeded),
		errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET):
		return report.ReasonLost
	}
	return report.ReasonSource
}

// errOptions and errLostPeer are kinds of errors, whose words say more.
var (
	errOptions  = errors.New("options")
	errLostPeer = errors.New("destination lost")
)

// wrongOptions marks an error of [Options.Validate].
type wrongOptions struct{ error }

func (e wrongOptions) Unwrap() []error { return []error{e.error, errOptions} }
