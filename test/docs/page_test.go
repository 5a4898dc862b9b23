// Package docs tests the documentation: its shell blocks are run, its links lead somewhere.
package docs

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// root is the module's directory, from here.
const root = "../.."

// block is a fenced block of a page that a reader may type.
type block struct {
	page   string // README.md, docs/tls.md
	line   int    // of its first line
	notRun string // why it is not run; empty: it is
	steps  []step // with those of the comments before it
}

// step is a command and what the page says that it prints.
type step struct {
	line    int
	command string
	output  []string
	hidden  bool // from a comment: <!-- before: COMMAND -->
}

var (
	fence    = regexp.MustCompile("^\\s*```(\\S*)$")
	notRunIs = regexp.MustCompile(`^\s*<!-- not run: ([^:]*?)(: .*)? -->$`)
	beforeIs = regexp.MustCompile(`^\s*<!-- before: (.*) -->$`)
	prompt   = regexp.MustCompile(`^\s*([a-z]+ [a-z]+)?\$ (.*)$`)
	typed    = regexp.MustCompile(`^\s*([A-Z_]+=\S* )*(sudo |host )?(govmm|go|make|git|curl|ssh|docker|qemu-[a-z0-9_-]+|test/[a-z/.]+|bin/govmm|ip|truncate|passt|systemctl|apt-get)( |$)`)
)

// pages are README.md, CONTRIBUTING.md, SECURITY.md, and all of docs.
func pages() ([]string, error) {
	all, err := filepath.Glob(root + "/docs/*.md")
	for i := range all {
		all[i] = "docs/" + filepath.Base(all[i])
	}
	return append([]string{"README.md", "CONTRIBUTING.md", "SECURITY.md"}, all...), err
}

// blocksOf returns the shell blocks of a page. A block is one if it has a prompt, or begins with a
// command; all others are output, files and drawings.
func blocksOf(page string) ([]block, error) {
	text, err := os.ReadFile(filepath.Join(root, page))
	if err != nil {
		return nil, err
	}
	var all []block
	lines := strings.Split(string(text), "\n")
	var notRun string
	var before []step
	for i := 0; i < len(lines); i++ {
		if m := notRunIs.FindStringSubmatch(lines[i]); m != nil {
			notRun = m[1]
			continue
		}
		if m := beforeIs.FindStringSubmatch(lines[i]); m != nil {
			before = append(before, step{line: i + 1, command: m[1], hidden: true})
			continue
		}
		m := fence.FindStringSubmatch(lines[i])
		if m == nil {
			if strings.TrimSpace(lines[i]) != "" && (notRun != "" || before != nil) {
				return nil, fmt.Errorf("%s:%d: a comment about a block, and no block behind it", page, i+1)
			}
			continue
		}
		first := i + 1
		for i++; i < len(lines) && !fence.MatchString(lines[i]); i++ {
		}
		if i == len(lines) {
			return nil, fmt.Errorf("%s:%d: the block does not end", page, first)
		}
		steps := stepsOf(lines[first:i], first+1)
		switch {
		case len(steps) == 0 && (notRun != "" || before != nil):
			return nil, fmt.Errorf("%s:%d: a comment about a block that has no command", page, first)
		case len(steps) > 0:
			all = append(all, block{page, first + 1, notRun, append(before, steps...)})
		}
		notRun, before = "", nil
	}
	return all, nil
}

// stepsOf takes a block apart; nil if it is none that is typed.
func stepsOf(lines []string, at int) (steps []step) {
	prompts := false
	for _, l := range lines {
		prompts = prompts || prompt.MatchString(l)
	}
	for i := 0; i < len(lines); i++ {
		l, line := lines[i], at+i
		text := strings.TrimSpace(l)
		if m := prompt.FindStringSubmatch(l); m != nil {
			text = m[2]
		} else if prompts {
			if len(steps) > 0 {
				last := &steps[len(steps)-1]
				last.output = append(last.output, l)
			}
			continue
		} else if i == 0 && (!typed.MatchString(l) || strings.HasPrefix(l, "govmm demo guest:")) {
			return nil
		} else if text == "" || strings.HasPrefix(text, "#") {
			continue
		}
		for strings.HasSuffix(text, `\`) && i+1 < len(lines) {
			i++
			text = strings.TrimSuffix(text, `\`) + strings.TrimSpace(lines[i])
		}
		steps = append(steps, step{line: line, command: text})
	}
	return steps
}
