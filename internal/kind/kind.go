// Package kind has the kinds of errors that a caller of a VM can act on, from the
// machine up to the HTTP API. Such an error has words of its own and matches its
// kind with errors.Is.
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
