package api

import (
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"unicode"

	"github.com/danielgtaylor/huma/v2"
	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/vmm"
)

// problem is what a client reads of an error, which is answered as RFC 9457 says. Its type
// names an error that a client can act on.
type problem struct {
	Type   string `json:"type"`
	Detail string `json:"detail"`
}

// errMethod is the kind of error of a route that is there for another method.
var errMethod = errors.New("wrong method")

// statuses are the HTTP statuses of the kinds of errors.
var statuses = []struct {
	kind   error
	status int
}{
	{vmm.ErrInvalid, http.StatusBadRequest},
	{ErrNotFound, http.StatusNotFound},
	{errMethod, http.StatusMethodNotAllowed},
	{vmm.ErrState, http.StatusConflict},
}

// types are the errors whose problem has a type of its own.
var types = []struct {
	err error
	typ string
}{
	{vmm.ErrNoBalloon, "urn:govmm:no-balloon"},
	{vmm.ErrMayRunElsewhere, "urn:govmm:may-run-elsewhere"},
	{vmm.ErrMigrationID, "urn:govmm:migration-id"},
}

// problemOf returns what err is answered with.
func problemOf(err error) *huma.ErrorModel {
	p := &huma.ErrorModel{Type: "about:blank", Status: http.StatusInternalServerError, Detail: oneLine(err)}
	for _, s := range statuses {
		if errors.Is(err, s.kind) {
			p.Status = s.status
			break
		}
	}
	for _, t := range types {
		if errors.Is(err, t.err) {
			p.Type = t.typ
		}
	}
	p.Title = http.StatusText(p.Status)
	return p
}

// writeProblem answers a request that no operation has seen.
func writeProblem(w http.ResponseWriter, err error) {
	p := problemOf(err)
	text, _ := json.Marshal(p) // strings and numbers
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(p.Status)
	_, _ = w.Write(append(text, '\n')) // a client that left cannot be told
}

// errorOf is the inverse of problemOf: an error with the same text that matches the
// same errors.
func errorOf(status int, p problem) error {
	var kinds []error
	for _, s := range statuses {
		if s.status == status {
			kinds = append(kinds, s.kind)
		}
	}
	for _, t := range types {
		if t.typ == p.Type {
			kinds = append(kinds, t.err)
		}
	}
	if kinds == nil {
		return errors.New(p.Detail)
	}
	return kind.Errorf(errors.Join(kinds...), "%s", p.Detail)
}

// oneLine is an error's text without line breaks: errors.Join puts one between
// its parts.
func oneLine(err error) string {
	return strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
}

// printable is text that a peer has sent, short and without what would end a line.
func printable(s string) string {
	const most = 300
	if len(s) > most {
		s = s[:most] + "…"
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, s)
}
