package api

import (
	"errors"
	"net/http"
	"strings"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/vmm"
)

// errorBody is what every error is answered with. Code names an error that a
// client can act on.
type errorBody struct {
	Error string `json:"error"`
	Code  string `json:"code,omitempty"`
}

// statuses are the HTTP statuses of the kinds of errors.
var statuses = []struct {
	kind   error
	status int
}{
	{vmm.ErrInvalid, http.StatusBadRequest},
	{ErrNotFound, http.StatusNotFound},
	{vmm.ErrState, http.StatusConflict},
}

// codes are the errors with a code.
var codes = []struct {
	err  error
	code string
}{
	{vmm.ErrNoBalloon, "no-balloon"},
	{vmm.ErrMayRunElsewhere, "may-run-elsewhere"},
}

// answer returns what err is answered with.
func answer(err error) (status int, body errorBody) {
	status, body = http.StatusInternalServerError, errorBody{Error: oneLine(err)}
	for _, s := range statuses {
		if errors.Is(err, s.kind) {
			status = s.status
			break
		}
	}
	for _, c := range codes {
		if errors.Is(err, c.err) {
			body.Code = c.code
		}
	}
	return status, body
}

// errorOf is the inverse of answer: an error with the same text that matches the
// same errors.
func errorOf(status int, body errorBody) error {
	var kinds []error
	for _, s := range statuses {
		if s.status == status {
			kinds = append(kinds, s.kind)
		}
	}
	for _, c := range codes {
		if c.code == body.Code {
			kinds = append(kinds, c.err)
		}
	}
	if kinds == nil {
		return errors.New(body.Error)
	}
	return kind.Errorf(errors.Join(kinds...), "%s", body.Error)
}

// oneLine is an error's text without line breaks: errors.Join puts one between
// its parts.
func oneLine(err error) string {
	return strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
}
