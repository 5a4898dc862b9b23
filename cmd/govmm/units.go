package main

import (
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
	"time"
)

// parseSize reads a SIZE: a whole number of bytes, or of KiB, MiB, GiB or TiB
// with the suffix K, M, G or T (also k..., Ki..., KiB...).
func parseSize(s string) (uint64, error) {
	digits := strings.TrimRight(s, "KMGTkmgtiB")
	suffix := s[len(digits):]
	shift, ok := map[string]int{"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[sizeUnit(suffix)]
	if !ok || digits == "" || strings.Trim(digits, "0123456789") != "" {
		return 0, fmt.Errorf("expected a whole number with K, M, G or T, as in 512M")
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	if err != nil || bits.Len64(n)+shift > 64 {
		return 0, fmt.Errorf("must be less than 2^64 bytes")
	}
	return n << shift, nil
}

// sizeUnit reduces a suffix to K, M, G or T, or to none.
func sizeUnit(suffix string) string {
	if len(suffix) > 1 {
		if rest := suffix[1:]; rest != "i" && rest != "iB" {
			return suffix
		}
		suffix = suffix[:1]
	}
	return strings.ToUpper(suffix)
}

// sizeFlag is a flag whose value is a SIZE in bytes.
type sizeFlag uint64

func (f *sizeFlag) String() string { return formatSize(uint64(*f)) }
func (f *sizeFlag) Type() string   { return "SIZE" }
func (f *sizeFlag) Set(s string) error {
	n, err := parseSize(s)
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
	n, err := parseSize(s)
	*f = rateFlag(n)
	return err
}

// formatSize writes bytes exactly, in the syntax of parseSize.
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
