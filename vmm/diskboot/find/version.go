package find

import "strings"

// compareVersions orders versions as the Boot Loader Specification does (and rpm and dpkg
// nearly so): numbers as numbers, words as words, ~ before everything. It is
// negative if a is older.
func compareVersions(a, b string) int {
	const marks = "~-^."
	valid := func(c byte) bool {
		return c >= '0' && c <= '9' || c|0x20 >= 'a' && c|0x20 <= 'z' || strings.IndexByte(marks, c) >= 0
	}
	skip := func(s string) string {
		for len(s) > 0 && !valid(s[0]) {
			s = s[1:]
		}
		return s
	}
	for {
		a, b = skip(a), skip(b)
		if x, y := strings.HasPrefix(a, "~"), strings.HasPrefix(b, "~"); x || y {
			if x != y {
				return sign(y, x)
			}
			a, b = a[1:], b[1:]
			continue
		}
		if a == "" || b == "" {
			return sign(a != "", b != "")
		}
		next := false
		for _, mark := range marks[1:] {
			x, y := rune(a[0]) == mark, rune(b[0]) == mark
			if x != y {
				return sign(y, x)
			}
			if x {
				a, b, next = a[1:], b[1:], true
				break
			}
		}
		if next {
			continue
		}
		var x, y string
		if isDigit(a[0]) || isDigit(b[0]) {
			x, a = span(a, isDigit)
			y, b = span(b, isDigit)
			x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
			if len(x) != len(y) {
				return len(x) - len(y)
			}
		} else {
			x, a = span(a, isLetter)
			y, b = span(b, isLetter)
		}
		if c := strings.Compare(x, y); c != 0 {
			return c
		}
	}
}

// sign is 1 if only the first holds, -1 if only the second does.
func sign(first, second bool) int {
	switch {
	case first == second:
		return 0
	case first:
		return 1
	}
	return -1
}

func isDigit(c byte) bool  { return c >= '0' && c <= '9' }
func isLetter(c byte) bool { return c|0x20 >= 'a' && c|0x20 <= 'z' }

// span cuts what is of a kind off the beginning.
func span(s string, is func(byte) bool) (head, tail string) {
	n := 0
	for n < len(s) && is(s[n]) {
		n++
	}
	return s[:n], s[n:]
}
