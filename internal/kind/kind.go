// Package kind has the kinds of errors that a caller of a VM can act on, from the
// machine up to the HTTP API. Such an error has words of its own and matches its
// kind with errors.Is.
//
// It also says which errors the peer of a migration may read, who may be anybody: those
// that [Told] or [Hidden] has made, see [migrate.ForPeer]. Of all others, whose words may
// name files of this host, the peer learns nothing.
package kind

import (
	"errors"
	"fmt"
)

var (
	// ErrState: the state of the VM does not allow the call.
	ErrState = errors.New("not possible in this state")
	// ErrInvalid: the request itself is at fault.
	ErrInvalid = errors.New("invalid request")
)

// Errorf returns an error of the kind with the words that fmt.Errorf makes.
func Errorf(kind error, format string, args ...any) error {
	return &kindError{kind, fmt.Errorf(format, args...)}
}

// State is Errorf with ErrState.
func State(format string, args ...any) error { return Errorf(ErrState, format, args...) }

// Invalid is Errorf with ErrInvalid.
func Invalid(format string, args ...any) error { return Errorf(ErrInvalid, format, args...) }

type kindError struct {
	kind error
	err  error
}

func (e *kindError) Error() string   { return e.err.Error() }
func (e *kindError) Unwrap() []error { return []error{e.err, e.kind} }

// Told returns err, whose words a peer may read, and those of the members if it is
// joined: they name what the peer has sent, and what a guest can see of this host.
func Told(err error) error {
	if err == nil {
		return nil
	}
	return &toldError{err}
}

// Hidden returns err, of which a peer reads only the words that fmt.Errorf makes.
func Hidden(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &hiddenError{err, fmt.Sprintf(format, args...)}
}

type toldError struct{ error }

func (e *toldError) Unwrap() error   { return e.error }
func (e *toldError) ForPeer() string { return e.Error() }

type hiddenError struct {
	error
	words string
}

func (e *hiddenError) Unwrap() error   { return e.error }
func (e *hiddenError) ForPeer() string { return e.words }
