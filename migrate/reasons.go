package migrate

import (
	"errors"
	"fmt"
	"strings"
)

// A source may be anybody, and what went wrong at a destination may name its files. So a
// source reads of an error only what is marked for it: by [ForPeer], as a fault of what
// it has sent itself ([ErrProtocol]), or by openly. The destination's log has the rest.

// ForPeer is an error that says what of it a peer may read. If that is all of it, so
// are the members of an error that it wraps and that is joined, one by one. The errors
// of a [Builder] and of a [Target] are such errors, or tell the source nothing.
type ForPeer interface {
	error
	// ForPeer returns the words, one line.
	ForPeer() string
}

// seeLog is what a source reads where there is more that it may not.
const seeLog = "see the destination's log"

// openly returns an error whose words a source may read.
func openly(format string, args ...any) error { return &openError{fmt.Errorf(format, args...)} }

type openError struct{ error }

func (e *openError) Unwrap() error   { return e.error }
func (e *openError) ForPeer() string { return e.Error() }

// stepError says in which step of the destination an error has come. A source may know.
type stepError struct {
	step string
	error
}

func (e *stepError) Error() string { return e.step + ": " + e.error.Error() }
func (e *stepError) Unwrap() error { return e.error }

// listOf returns the members of a joined error one by one, with all their words.
func listOf(err error) []string {
	var list []string
	for _, e := range membersOf(err) {
		if len(list) < maxReasons {
			list = append(list, clip(e.Error()))
		}
	}
	return list
}

// membersOf takes a joined error apart, as errors.Join has made it.
func membersOf(err error) []error {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []error{err}
	}
	var all []error
	var words []string
	for _, e := range joined.Unwrap() {
		all = append(all, membersOf(e)...)
		words = append(words, e.Error())
	}
	if strings.Join(words, "\n") != err.Error() { // %w in a text
		return []error{err}
	}
	return all
}

// reasonsOf returns what a source may read of an error, at most maxReasons.
func reasonsOf(err error) []string {
	list, hides := reasons(err, false)
	if hides {
		list = append(list[:min(len(list), maxReasons-1)], seeLog)
	}
	return list[:min(len(list), maxReasons)]
}

// reasons is reasonsOf. told says that the words of err are for the source, unless
// something in it says otherwise. hides says that there are others.
func reasons(err error, told bool) (list []string, hides bool) {
	members := membersOf(err)
	if len(members) != 1 {
		for _, e := range members {
			more, hidden := reasons(e, told)
			list, hides = append(list, more...), hides || hidden
		}
		return list, hides
	}
	err = members[0]
	var marked ForPeer
	switch e := err.(type) {
	case ForPeer:
		if words := e.ForPeer(); words != e.Error() {
			return []string{clip(words)}, true
		}
		if inner := errors.Unwrap(err); inner != nil {
			return reasons(inner, true)
		}
		return []string{clip(e.Error())}, false
	case *stepError:
		list, hides = reasons(e.error, told)
		for i, words := range list {
			list[i] = clip(e.step + ": " + words)
		}
		if len(list) == 0 {
			list = []string{e.step}
		}
		return list, hides
	}
	switch {
	case errors.Is(err, ErrProtocol):
		return []string{clip(err.Error())}, false
	case errors.As(err, &marked): // the words around it are not
		list, hides = reasons(marked, told)
		return list, hides || !told
	case told:
		return []string{clip(err.Error())}, false
	}
	return nil, true
}
