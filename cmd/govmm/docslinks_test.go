package main

import (
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode"

	"github.com/govmm/govmm/internal/testenv"
)

var (
	pageLink = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading  = regexp.MustCompile(`^#+ (.*)$`)
	inCode   = regexp.MustCompile("`[^`]*`")
)

// TestDocLinks follows each link of the documentation: to a file of the repository, and to a
// heading in it. The index, docs/README.md, has a link to each page.
func TestDocLinks(t *testing.T) {
	all, err := filepath.Glob(moduleRoot + "/docs/*.md")
	testenv.Check(t, err)
	for i := range all {
		all[i] = "docs/" + filepath.Base(all[i])
	}
	indexed, links := map[string]bool{}, 0
	for _, page := range append(all, "README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md") {
		for _, to := range linksOf(t, page) {
			links++
			if strings.Contains(to, "://") || strings.HasPrefix(to, "mailto:") {
				continue
			}
			name, anchor, _ := strings.Cut(to, "#")
			target := page
			if name != "" {
				target = path.Join(path.Dir(page), name)
			}
			if page == "docs/README.md" {
				indexed[target] = true
			}
			if _, err := os.Stat(filepath.Join(moduleRoot, target)); err != nil {
				t.Errorf("%s: a link to %s: %v", page, to, err)
			} else if anchor != "" && !headingsOf(t, target)[anchor] {
				t.Errorf("%s: a link to %s: %s has no such heading", page, to, target)
			}
		}
	}
	for _, page := range all {
		if page != "docs/README.md" && !indexed[page] {
			t.Errorf("docs/README.md has no link to %s", page)
		}
	}
	t.Logf("%d links in %d pages", links, len(all))
}

// textLines returns the lines of a page that are in no fenced block.
func textLines(t *testing.T, page string) (lines []string) {
	text, err := os.ReadFile(filepath.Join(moduleRoot, page))
	testenv.Check(t, err)
	block := false
	for l := range strings.SplitSeq(string(text), "\n") {
		if strings.HasPrefix(strings.TrimSpace(l), "```") {
			block = !block
		} else if !block {
			lines = append(lines, l)
		}
	}
	return lines
}

func linksOf(t *testing.T, page string) (all []string) {
	for _, l := range textLines(t, page) {
		for _, m := range pageLink.FindAllStringSubmatch(inCode.ReplaceAllString(l, ""), -1) {
			all = append(all, m[1])
		}
	}
	return all
}

// headingsOf returns the names of a page's headings, as GitHub makes them.
func headingsOf(t *testing.T, page string) map[string]bool {
	all := map[string]bool{}
	for _, l := range textLines(t, page) {
		if m := heading.FindStringSubmatch(l); m != nil {
			all[anchorOf(m[1])] = true
		}
	}
	return all
}

func anchorOf(title string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case unicode.IsLetter(r) || unicode.IsDigit(r) || r == '-' || r == '_':
			return unicode.ToLower(r)
		}
		return -1
	}, title)
}
