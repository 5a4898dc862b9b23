package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/govmm/govmm/internal/units"
)

// sizeFlag is a flag whose value is a SIZE in bytes.
type sizeFlag uint64

func (f *sizeFlag) String() string { return formatSize(uint64(*f)) }
func (f *sizeFlag) Type() string   { return "SIZE" }
func (f *sizeFlag) Set(s string) error {
	n, err := units.ParseBytes(s)
	*f = sizeFlag(n)
	return err
}

// rateFlag is a flag whose value is a SIZE a second; "/s" may be left out.
type rateFlag uint64

func (f *rateFlag) String() string {
	if *f == 0 {
		return "none"
	}
	return formatSize(uint64(*f)) + "/s"
}
func (f *rateFlag) Type() string { return "SIZE/S" }
func (f *rateFlag) Set(s string) error {
	if n := len(s) - len("/s"); n >= 0 && strings.EqualFold(s[n:], "/s") {
		s = s[:n]
	}
	n, err := units.ParseBytes(s)
	*f = rateFlag(n)
	return err
}

// formatSize writes bytes exactly, in the syntax of units.ParseBytes.
func formatSize(n uint64) string {
	unit := 0
	for n != 0 && n%1024 == 0 && unit < 4 {
		n /= 1024
		unit++
	}
	return strconv.FormatUint(n, 10) + []string{"", "K", "M", "G", "T"}[unit]
}

// formatMS writes a duration for people.
func formatMS(d time.Duration) string {
	ms := float64(d) / float64(time.Millisecond)
	switch {
	case ms < 100 && ms != math.Trunc(ms):
		return fmt.Sprintf("%.1f ms", ms)
	case ms < 10000:
		return fmt.Sprintf("%.0f ms", ms)
	}
	return fmt.Sprintf("%.1f s", ms/1000)
}
