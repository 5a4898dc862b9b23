// Package units reads and writes quantities for people.
package units

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
)

// Bytes writes a number of bytes for people, with about three digits.
func Bytes(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n)/1024, 0
	for v >= 1023.5 && unit < 4 {
		v /= 1024
		unit++
	}
	name := []string{"KiB", "MiB", "GiB", "TiB", "PiB"}[unit]
	if v < 9.995 {
		return fmt.Sprintf("%.2f %s", v, name)
	}
	if v < 99.95 {
		return fmt.Sprintf("%.1f %s", v, name)
	}
	return fmt.Sprintf("%.0f %s", v, name)
}

// ParseBytes reads a number of bytes for people: a whole number of bytes, or of KiB, MiB, GiB or TiB
// with the suffix K, M, G or T (also k..., Ki..., KiB...).
func ParseBytes(s string) (uint64, error) {
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
