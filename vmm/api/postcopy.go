package api

import (
	"fmt"
	"strconv"

	"github.com/govmm/govmm/migrate"
)

// ParsePostcopy reads when the guest of a migration moves before all of its memory has:
// "auto", or after so many rounds.
func ParsePostcopy(s string) (int, error) {
	if s == "auto" {
		return migrate.PostcopyAuto, nil
	}
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil || n < 1 {
		return 0, fmt.Errorf("postcopy %.80q: expected auto, or a number of rounds of at least 1", s)
	}
	return int(n), nil
}
