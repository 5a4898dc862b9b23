package kind

import (
	"errors"
	"io"
	"testing"
)

func TestErrorf(t *testing.T) {
	err := State("the VM is gone: %w", io.EOF)
	if err.Error() != "the VM is gone: EOF" {
		t.Errorf("words %q", err)
	}
	if !errors.Is(err, ErrState) || !errors.Is(err, io.EOF) || errors.Is(err, ErrInvalid) {
		t.Errorf("%v matches the wrong errors", err)
	}
	if err := Invalid("no"); !errors.Is(err, ErrInvalid) {
		t.Errorf("%v does not match ErrInvalid", err)
	}
}
