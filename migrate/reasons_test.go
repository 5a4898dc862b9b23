package migrate

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/kind"
)

// TestReasons: a source reads what is marked for it, whole lists of it, and of all else
// that there is a log.
func TestReasons(t *testing.T) {
	secret := errors.New("/etc/shadow: permission denied")
	open := openly("too late")
	for _, c := range []struct {
		err  error
		want []string
	}{
		{secret, []string{seeLog}},
		{errors.Join(secret, secret), []string{seeLog}},
		{open, []string{"too late"}},
		{fmt.Errorf("at 10.0.0.1: %w", open), []string{"too late", seeLog}},
		{fmt.Errorf("%w: %w", secret, open), []string{"too late", seeLog}},
		{errors.Join(open, secret, openly("too early")), []string{"too late", "too early", seeLog}},
		{fmt.Errorf("%w: a frame of 3 bytes", ErrProtocol), []string{ErrProtocol.Error() + ": a frame of 3 bytes"}},
		{&stepError{"load it", secret}, []string{"load it", seeLog}},
		{&stepError{"load it", errors.Join(secret, open)}, []string{"load it: too late", seeLog}},
		{kind.Told(errors.Join(errors.New("a"), errors.Join(errors.New("b"), errors.New("c")))), []string{"a", "b", "c"}},
		{kind.Told(errors.Join(errors.New("a"), kind.Hidden(secret, "disk %d", 1))), []string{"a", "disk 1", seeLog}},
		{kind.Told(fmt.Errorf("x: %w", kind.Hidden(secret, "disk 1"))), []string{"disk 1", seeLog}},
		{kind.Hidden(kind.Told(secret), "no"), []string{"no", seeLog}},
		{kind.State("%w", secret), []string{seeLog}},
		{kind.Told(errors.New("a\nb\x1b")), []string{"a b "}},
	} {
		got := reasonsOf(c.err)
		if !slices.Equal(got, c.want) {
			t.Errorf("%v: a source reads %q, want %q", c.err, got, c.want)
		}
		if strings.Contains(strings.Join(got, ""), "shadow") {
			t.Errorf("%v: a source reads %q", c.err, got)
		}
	}
	if all := listOf(errors.Join(open, fmt.Errorf("disk: %w", secret))); !slices.Equal(all, []string{"too late", "disk: " + secret.Error()}) {
		t.Errorf("the log has %q", all)
	}
	many := make([]error, 2*maxReasons)
	for i := range many {
		many[i] = openly("%d", i)
	}
	if n := len(reasonsOf(errors.Join(many...))); n != maxReasons {
		t.Errorf("%d reasons, want %d", n, maxReasons)
	}
	if got := reasonsOf(errors.Join(append(many, secret)...)); len(got) != maxReasons || got[maxReasons-1] != seeLog {
		t.Errorf("%d reasons, the last is %q", len(got), got[len(got)-1])
	}
	if kind.Told(nil) != nil || kind.Hidden(nil, "x") != nil {
		t.Error("no error has become one")
	}
}
