package main

import (
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	href = regexp.MustCompile(`(?:href|src)="([^"]+)"`)
	id   = regexp.MustCompile(`id="([^"]+)"`)
)

// The site needs nothing from elsewhere, and each of its links leads to a page and a heading.
func TestSite(t *testing.T) {
	dir := t.TempDir()
	if err := build("../..", dir); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(dir + "/*.html")
	if err != nil || len(files) < 30 {
		t.Fatalf("%d pages: %v", len(files), err)
	}
	text, ids := map[string]string{}, map[string]map[string]bool{}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Base(f)
		text[name], ids[name] = string(b), map[string]bool{}
		for _, m := range id.FindAllStringSubmatch(string(b), -1) {
			if ids[name][m[1]] {
				t.Errorf("%s: two elements are called %s", name, m[1])
			}
			ids[name][m[1]] = true
		}
		if strings.Contains(string(b), "<!-- ") || strings.Contains(string(b), "<script src") || strings.Contains(string(b), "<link") {
			t.Errorf("%s: a comment of the source, or something from elsewhere", name)
		}
	}
	for name, page := range text {
		for _, m := range href.FindAllStringSubmatch(page, -1) {
			u, err := url.Parse(m[1])
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if u.Host != "" {
				continue
			}
			to := name
			if u.Path != "" {
				to = u.Path
			}
			if _, err := os.Stat(filepath.Join(dir, to)); err != nil {
				t.Errorf("%s: a link to %s: %v", name, m[1], err)
			} else if u.Fragment != "" && !ids[to][u.Fragment] {
				t.Errorf("%s: a link to %s, which has no such heading", name, m[1])
			}
		}
	}
}
