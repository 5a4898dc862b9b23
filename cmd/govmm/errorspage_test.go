package main

import (
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/govmm/govmm/migrate/report"
)

// TestDocErrors compares docs/errors.md with all errors that the code makes. Each text that says
// something by itself must be in the page's tables, where … stands for any value, unless its
// package is in the last table, which explains all messages of a package at once. Nothing else
// may be in the tables. What the kernel, the flag parser and libraries say after govmm's own
// words is not compared, nor are lines of the log that are no errors.
func TestDocErrors(t *testing.T) {
	text, err := os.ReadFile(path.Join(moduleRoot, "docs/errors.md"))
	if err != nil {
		t.Fatal(err)
	}
	listed, inside, ok := strings.Cut(string(text), "\n## From the inside\n")
	if !ok {
		t.Fatal("docs/errors.md has no section From the inside")
	}
	listed, begin, _ := strings.Cut(listed, "\n## By the beginning\n")
	var patterns []*pattern
	for _, p := range firstCells(listed) {
		patterns = append(patterns, newPattern(t, p, mostTexts))
	}
	for _, p := range firstCells(begin) {
		patterns = append(patterns, newPattern(t, p, 1000))
	}
	whole := firstCells(inside)
	counts := map[string]int{}
	all := messages(t)
	for _, m := range all {
		text := bare(m.text)
		if letters(text) < 3 || onlyFlag.MatchString(text) {
			counts["only words around another error"]++
			continue
		}
		found := false
		for _, p := range patterns {
			if p.re.MatchString(text) {
				p.matched, found = append(p.matched, text), true
			}
		}
		switch {
		case found:
			counts["in a table by themselves"]++
		case slices.Contains(whole, m.pkg):
			counts["explained with their package"]++
		default:
			t.Errorf("docs/errors.md has no row for %q (%s)", m.text, m.where)
		}
	}
	for _, p := range patterns {
		slices.Sort(p.matched)
		switch n := len(slices.Compact(p.matched)); {
		case n == 0:
			t.Errorf("docs/errors.md: no error of govmm is %q", p.text)
		case n > p.most:
			t.Errorf("docs/errors.md: %q stands for %d errors: say more", p.text, n)
		}
	}
	for _, pkg := range whole {
		if !slices.ContainsFunc(all, func(m message) bool { return m.pkg == pkg }) {
			t.Errorf("docs/errors.md: package %s makes no error", pkg)
		}
	}
	t.Logf("%d texts, %d entries: %v", len(all), len(patterns), counts)
}

// onlyFlag is the text of an error that only says to which flag the words behind it belong.
var onlyFlag = regexp.MustCompile(`^--[a-z-]+( …)?$`)

// mostTexts is how many different texts an entry may stand for.
const mostTexts = 12

// pattern is an entry of a table.
type pattern struct {
	text    string
	re      *regexp.Regexp
	most    int
	matched []string
}

func newPattern(t *testing.T, text string, most int) *pattern {
	if letters(text) < 3 {
		t.Errorf("docs/errors.md: %q says too little", text)
	}
	re := strings.ReplaceAll(regexp.QuoteMeta(text), "…", ".*")
	re = strings.TrimPrefix(re, ".*: ")
	if begin, ok := strings.CutSuffix(re, ": .*"); ok {
		re = begin + "(: .*)?"
	}
	return &pattern{text: text, re: regexp.MustCompile("^(.*: )?" + re + "$"), most: most}
}

// bare takes values off the ends of a text, where other errors stand.
func bare(s string) string {
	for {
		short := strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(s), "…: "), ": …")
		if short == s {
			return s
		}
		s = short
	}
}

func letters(s string) (n int) {
	for _, r := range s {
		if unicode.IsLetter(r) {
			n++
		}
	}
	return n
}

var inBackticks = regexp.MustCompile("`([^`]+)`")

// firstCells returns what stands in backticks in the first column of a page's tables.
func firstCells(page string) (all []string) {
	for line := range strings.SplitSeq(page, "\n") {
		if !strings.HasPrefix(line, "| `") {
			continue
		}
		cell, _, _ := strings.Cut(strings.ReplaceAll(line[2:], `\|`, "\x00"), "|")
		for _, m := range inBackticks.FindAllStringSubmatch(cell, -1) {
			all = append(all, strings.ReplaceAll(m[1], "\x00", "|"))
		}
	}
	return all
}

// Each reason of a migration has its row.
func TestDocReasons(t *testing.T) {
	text, err := os.ReadFile(path.Join(moduleRoot, "docs/errors.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range report.Reasons() {
		if !strings.Contains(string(text), "**"+string(r)+"**") {
			t.Errorf("docs/errors.md: nothing about the reason %s", r)
		}
	}
}
