package find

import (
	"errors"
	"fmt"
	"strings"
)

// GRUB's language, as far as the configurations of distributions need it: words with quotes
// and variables, if, while and until (skipped), for (skipped), functions, and blocks of
// menuentry and submenu.

const (
	maxNodes   = 100_000 // commands of a configuration
	maxNesting = 32
)

var errGrubTooLong = fmt.Errorf("more than %d commands, or nested more than %d deep", maxNodes, maxNesting)

// piece is a part of a word: text, or a variable's value.
type piece struct {
	text     string
	variable bool
	quoted   bool // a variable's value is not split into words
}

type word []piece

// command is one command, or a construct with blocks.
type command struct {
	words []word
	block []command // of menuentry, submenu, function, and while, until and for
	tests [][]command
	thens [][]command // one more than tests: the else
}

// plain returns a word's text if it has neither variables nor quotes, as keywords.
func (w word) plain() string {
	if len(w) == 1 && !w[0].variable && !w[0].quoted {
		return w[0].text
	}
	return ""
}

// grubParser reads a configuration from its beginning.
type grubParser struct {
	s     string
	nodes int
}

// parseGrub reads a configuration.
func parseGrub(text string) ([]command, error) {
	p := &grubParser{s: text}
	list, _, err := p.list(0)
	return list, err
}

// token is a word, or one of the signs ; { } and the end of a line, which is ";".
type token struct {
	word word
	sign byte // 0: a word
}

// next reads a token; ok is false at the end.
func (p *grubParser) next() (t token, ok bool) {
	for len(p.s) > 0 {
		switch c := p.s[0]; c {
		case ' ', '\t', '\r':
			p.s = p.s[1:]
		case '\\':
			if len(p.s) > 1 && p.s[1] == '\n' {
				p.s = p.s[2:]
				continue
			}
			return token{word: p.word()}, true
		case '#':
			if i := strings.IndexByte(p.s, '\n'); i >= 0 {
				p.s = p.s[i:]
			} else {
				p.s = ""
			}
		case '\n', ';', '&', '|':
			p.s = p.s[1:]
			return token{sign: ';'}, true
		case '{', '}':
			p.s = p.s[1:]
			return token{sign: c}, true
		default:
			return token{word: p.word()}, true
		}
	}
	return token{}, false
}

// word reads a word, which begins here.
func (p *grubParser) word() (w word) {
	var text strings.Builder
	quoted, wrote := false, false
	flush := func() {
		if wrote || text.Len() > 0 {
			w = append(w, piece{text: text.String(), quoted: quoted})
			text.Reset()
		}
		wrote, quoted = false, false
	}
	for len(p.s) > 0 {
		switch c := p.s[0]; c {
		case ' ', '\t', '\r', '\n', ';', '{', '}', '&', '|':
			flush()
			return w
		case '\\':
			if len(p.s) > 1 && p.s[1] != '\n' {
				text.WriteByte(p.s[1])
			}
			quoted = true
			p.s = p.s[min(2, len(p.s)):]
		case '\'':
			end := strings.IndexByte(p.s[1:], '\'')
			if end < 0 {
				end = len(p.s) - 1
			}
			text.WriteString(p.s[1 : 1+end])
			quoted, wrote = true, true
			p.s = p.s[min(end+2, len(p.s)):]
		case '"':
			p.s = p.s[1:]
			quoted, wrote = true, true
			for len(p.s) > 0 && p.s[0] != '"' {
				switch {
				case p.s[0] == '\\' && len(p.s) > 1 && strings.IndexByte("\\\"$\n", p.s[1]) >= 0:
					if p.s[1] != '\n' {
						text.WriteByte(p.s[1])
					}
					p.s = p.s[2:]
				case p.s[0] == '$':
					name, isName := p.variable()
					if !isName {
						text.WriteByte('$')
						continue
					}
					flush()
					w = append(w, piece{text: name, variable: true, quoted: true})
				default:
					text.WriteByte(p.s[0])
					p.s = p.s[1:]
				}
			}
			quoted = true
			p.s = p.s[min(1, len(p.s)):]
		case '$':
			name, isName := p.variable()
			if !isName {
				text.WriteByte('$')
				continue
			}
			flush()
			w = append(w, piece{text: name, variable: true})
		default:
			text.WriteByte(c)
			p.s = p.s[1:]
		}
	}
	flush()
	return w
}

// variable reads $NAME or ${NAME}; it has passed the dollar if there is no name.
func (p *grubParser) variable() (name string, ok bool) {
	p.s = p.s[1:]
	if strings.HasPrefix(p.s, "{") {
		end := strings.IndexByte(p.s, '}')
		if end < 0 {
			return "", false
		}
		name, p.s = p.s[1:end], p.s[end+1:]
		return name, true
	}
	n := 0
	for n < len(p.s) && (p.s[n] == '_' || p.s[n] >= '0' && p.s[n] <= '9' || p.s[n]|0x20 >= 'a' && p.s[n]|0x20 <= 'z') {
		n++
	}
	if n == 0 && len(p.s) > 0 && strings.IndexByte("?#@*", p.s[0]) >= 0 {
		n = 1
	}
	name, p.s = p.s[:n], p.s[n:]
	return name, n > 0
}

// list reads commands to a closing brace, one of the keywords, or the end. It returns what
// it ended with: "}", the keyword, or "".
func (p *grubParser) list(depth int, ends ...string) (list []command, end string, err error) {
	if depth > maxNesting {
		return nil, "", errGrubTooLong
	}
	for {
		t, ok := p.next()
		switch {
		case !ok:
			return list, "", nil
		case t.sign == '}':
			return list, "}", nil
		case t.sign == '{':
			inner, _, err := p.list(depth + 1)
			if err != nil {
				return nil, "", err
			}
			list = append(list, inner...)
			continue
		case t.sign != 0:
			continue
		}
		if p.nodes++; p.nodes > maxNodes {
			return nil, "", errGrubTooLong
		}
		key := t.word.plain()
		for _, e := range ends {
			if key == e {
				return list, e, nil
			}
		}
		var c command
		switch key {
		case "if":
			c, err = p.condition(depth)
		case "while", "until", "for":
			c, err = p.loop(t.word, depth)
		default:
			c, err = p.simple(t.word, depth)
		}
		if err != nil {
			return nil, "", err
		}
		list = append(list, c)
	}
}

// condition reads what follows an if, to its fi.
func (p *grubParser) condition(depth int) (c command, err error) {
	c.words = []word{{{text: "if"}}}
	for {
		test, end, err := p.list(depth+1, "then")
		if err != nil {
			return c, err
		}
		if end != "then" {
			return c, errors.New("an if without a then")
		}
		then, end, err := p.list(depth+1, "elif", "else", "fi")
		if err != nil {
			return c, err
		}
		c.tests, c.thens = append(c.tests, test), append(c.thens, then)
		switch end {
		case "elif":
			continue
		case "else":
			otherwise, _, err := p.list(depth+1, "fi")
			c.thens = append(c.thens, otherwise)
			return c, err
		}
		return c, nil
	}
}

// loop reads a loop, to its done.
func (p *grubParser) loop(first word, depth int) (c command, err error) {
	c.words = []word{first}
	if _, _, err = p.list(depth+1, "do"); err == nil {
		_, _, err = p.list(depth+1, "done")
	}
	return c, err
}

// simple reads a command to the end of its line, with its block, if it has one.
func (p *grubParser) simple(first word, depth int) (c command, err error) {
	c.words = []word{first}
	for {
		t, ok := p.next()
		switch {
		case !ok || t.sign == ';':
			return c, nil
		case t.sign == '}':
			p.s = "}" + p.s
			return c, nil
		case t.sign == '{':
			switch first.plain() {
			case "menuentry", "submenu", "function", "hiddenentry":
				c.block, _, err = p.list(depth + 1)
				return c, err
			}
			c.words = append(c.words, word{{text: "{"}})
		default:
			if p.nodes++; p.nodes > maxNodes {
				return c, errGrubTooLong
			}
			c.words = append(c.words, t.word)
		}
	}
}
