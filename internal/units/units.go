// Package units writes quantities for people.
package units

import "fmt"

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
