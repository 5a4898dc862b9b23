package screen

import (
	"reflect"
	"testing"
)

func TestKeys(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want []Key
		rest string
	}{
		{"q", []Key{'q'}, ""},
		{"\x1b[A\x1b[B\x1b[C\x1b[D", []Key{Up, Down, Right, Left}, ""},
		{"\x1bOA\x1bOF\x1bOH", []Key{Up, End, Home}, ""},
		{"\x1b[5~\x1b[6~\x1b[1~\x1b[4~\x1b[3~\x1b[H\x1b[F", []Key{PageUp, PageDown, Home, End, Delete, Home, End}, ""},
		{"\x1b[1;5A\x1b[24~x", []Key{Up, Unknown, 'x'}, ""},
		{"\x1b", nil, "\x1b"},
		{"\x1b[", nil, "\x1b["},
		{"a\x1b[1;", []Key{'a'}, "\x1b[1;"},
		{"\x1bx", []Key{Unknown}, ""},
		{"\x1b\x1b[A", []Key{Escape, Up}, ""},
		{"\r\n\x03\x7f", []Key{Enter, Enter, CtrlC, Backspace}, ""},
		{"ä\xff", []Key{'ä', Unknown}, ""},
		{"\xc3", nil, "\xc3"},
		{"\x1b[1\x01q", []Key{Unknown, 0x01, 'q'}, ""},
	} {
		got, rest := parse([]byte(tc.in))
		if !reflect.DeepEqual(got, tc.want) || string(rest) != tc.rest {
			t.Errorf("%q: %v and %q, want %v and %q", tc.in, got, rest, tc.want, tc.rest)
		}
	}
	if got := parseAll([]byte("\x1b"), true); !reflect.DeepEqual(got, []Key{Escape}) {
		t.Errorf("Esc alone: %v", got)
	}
	if got := parseAll([]byte("\x1b[1"), true); !reflect.DeepEqual(got, []Key{Escape, '[', '1'}) {
		t.Errorf("a part of a sequence: %v", got)
	}
}

// Whatever a terminal sends, in whatever parts, reading ends, and little of it waits.
func FuzzKeys(f *testing.F) {
	for _, s := range []string{"q\x1b[A", "\x1b[1;2;3", "\x1bO", "\xc3\x28\x1b\x1b", "\x1b[\x1b[\x1b["} {
		f.Add([]byte(s), 2)
	}
	f.Fuzz(func(t *testing.T, p []byte, part int) {
		part = min(max(part, 1), 64)
		var pending []byte
		for n := 0; len(p) > 0; n++ {
			k := min(part, len(p))
			pending = append(pending, p[:k]...)
			p = p[k:]
			_, rest := parse(pending)
			if len(rest) > maxSequence {
				t.Fatalf("%d bytes wait: %q", len(rest), rest)
			}
			pending = rest
		}
		parseAll(pending, true)
	})
}

// What is printed for a line has no control character but those of its style, and is no wider
// than the screen.
func FuzzLine(f *testing.F) {
	f.Add("web \x1b[2J\n", 20, 1)
	f.Add("", 20, 1)
	f.Fuzz(func(t *testing.T, text string, width, style int) {
		width = min(max(width, 1), 300)
		l := Line{text, Style(min(max(style, 0), len(codes)-1))}
		got := l.encode(width)
		if got != "" && l.Style != Plain {
			got = got[len(codes[l.Style]) : len(got)-len("\x1b[m")]
		}
		if len(got) > width {
			t.Errorf("%d wide, of %d", len(got), width)
		}
		for _, c := range []byte(got) {
			if c < ' ' || c > '~' {
				t.Fatalf("%q in %q", c, got)
			}
		}
	})
}
