package screen

import "unicode/utf8"

// Key is a key that was pressed: a character, or one of those below.
type Key rune

// Keys that are no characters.
const (
	Up Key = -1 - iota
	Down
	Left
	Right
	Home
	End
	PageUp
	PageDown
	Delete
	Escape
	Unknown // a sequence that has no meaning here
)

// Control characters that are keys of their own.
const (
	CtrlC     Key = 0x03
	CtrlD     Key = 0x04
	CtrlH     Key = 0x08
	Tab       Key = 0x09
	CtrlL     Key = 0x0c
	Enter     Key = 0x0d
	CtrlU     Key = 0x15
	CtrlW     Key = 0x17
	CtrlZ     Key = 0x1a
	Backspace Key = 0x7f
)

const esc = 0x1b

// maxSequence bounds an escape sequence, in bytes: what is longer is none.
const maxSequence = 32

// parse reads keys from what a terminal has sent. rest may be the beginning of one.
func parse(p []byte) (keys []Key, rest []byte) {
	for len(p) > 0 {
		k, n := next(p)
		if n == 0 {
			return keys, p
		}
		keys, p = append(keys, k), p[n:]
	}
	return keys, nil
}

// parseAll is parse of all there is; with last, what remains stands for itself.
func parseAll(p []byte, last bool) []Key {
	keys, rest := parse(p)
	for last && len(rest) > 0 {
		k := Unknown
		if rest[0] == esc {
			k = Escape
		}
		var more []Key
		more, rest = parse(rest[1:])
		keys = append(append(keys, k), more...)
	}
	return keys
}

// next reads one key; n is 0 if there is only a part of one.
func next(p []byte) (k Key, n int) {
	if p[0] != esc {
		if !utf8.FullRune(p) {
			return 0, 0
		}
		r, n := utf8.DecodeRune(p)
		if r == utf8.RuneError {
			return Unknown, n
		}
		if r == '\n' {
			r = '\r'
		}
		return Key(r), n
	}
	if len(p) == 1 {
		return 0, 0
	}
	switch p[1] {
	case '[':
		return control(p)
	case 'O': // SS3, in "application mode"
		if len(p) < 3 {
			return 0, 0
		}
		return final(p[2], ""), 3
	case esc:
		return Escape, 1
	}
	return Unknown, 2 // Alt and a key
}

// control reads a sequence that begins with ESC [: parameters, and a final byte (ECMA-48,
// 5.4).
func control(p []byte) (Key, int) {
	for i := 2; i < len(p); i++ {
		switch c := p[i]; {
		case c >= 0x40 && c <= 0x7e:
			return final(c, string(p[2:i])), i + 1
		case c < 0x20 || c > 0x7e || i == maxSequence:
			return Unknown, i
		}
	}
	return 0, 0
}

// final is the key of a sequence by its last byte and its parameters.
func final(c byte, parameters string) Key {
	switch c {
	case 'A':
		return Up
	case 'B':
		return Down
	case 'C':
		return Right
	case 'D':
		return Left
	case 'H':
		return Home
	case 'F':
		return End
	case 'M':
		return Enter // of the keypad, by SS3
	case '~':
		switch parameters {
		case "1", "7":
			return Home
		case "3":
			return Delete
		case "4", "8":
			return End
		case "5":
			return PageUp
		case "6":
			return PageDown
		}
	}
	return Unknown
}
