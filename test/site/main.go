// Command site makes HTML of the documentation: docs/*.md and the pages beside README.md, with
// the index of docs/README.md on each of them. The pages need nothing from elsewhere, and are read in
// light and in dark, on a screen, a phone and paper.
//
//	go run ./test/site DIR
package main

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"html/template"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"unicode"

	"github.com/yuin/goldmark"
	"github.com/yuin/goldmark/ast"
	"github.com/yuin/goldmark/extension"
	"github.com/yuin/goldmark/parser"
	"github.com/yuin/goldmark/renderer/html"
	"github.com/yuin/goldmark/text"
	"github.com/yuin/goldmark/util"
)

// index is the page that all others are found from.
const index = "docs/README.md"

//go:embed page.html
var pageText string

var pageTemplate = template.Must(template.New("page").Parse(pageText))

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: go run ./test/site DIR")
		os.Exit(2)
	}
	if err := build(".", os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "site:", err)
		os.Exit(1)
	}
}

// page is what the template gets.
type page struct {
	Title string
	Nav   []section
	Body  template.HTML
	Here  string // its file
}

// section is a part of the index.
type section struct {
	Title string
	Links []entry
}

type entry struct{ File, Title string }

// build writes the site of the repository at root to dir, which is made.
func build(root, dir string) error {
	sources, err := filepath.Glob(filepath.Join(root, "docs", "*"))
	if err != nil {
		return err
	}
	for i := range sources {
		sources[i] = "docs/" + filepath.Base(sources[i])
	}
	sources = append(sources, "README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "LICENSE")
	first, err := os.ReadFile(filepath.Join(root, index))
	if err != nil {
		return err
	}
	nav := navOf(string(first))
	if len(nav) == 0 {
		return errors.New(index + " has no links")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, name := range sources {
		content, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return err
		}
		to := fileOf(name)
		if strings.HasSuffix(name, ".md") {
			if content, err = render(name, content, nav); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, to), content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// fileOf is the name that a file of the repository has in the site, which is flat.
func fileOf(name string) string {
	switch name {
	case index:
		return "index.html"
	case "README.md":
		return "govmm.html"
	}
	if base, ok := strings.CutSuffix(path.Base(name), ".md"); ok {
		return base + ".html"
	}
	return path.Base(name)
}

var navLine = regexp.MustCompile(`\[([^\]]+)\]\(([^)]+)\)`)

// navOf finds the headings and links of the index.
func navOf(md string) (all []section) {
	for line := range strings.SplitSeq(md, "\n") {
		if title, ok := strings.CutPrefix(line, "## "); ok {
			all = append(all, section{Title: title})
		}
		if !strings.HasPrefix(line, "- ") || len(all) == 0 {
			continue
		}
		s := &all[len(all)-1]
		for _, m := range navLine.FindAllStringSubmatch(line, -1) {
			title := []rune(m[1])
			title[0] = unicode.ToUpper(title[0])
			s.Links = append(s.Links, entry{fileOf(path.Join("docs", m[2])), string(title)})
		}
	}
	return all
}

var comment = regexp.MustCompile(`(?m)^\s*<!-- .* -->\n`)

// render makes a page of Markdown.
func render(name string, md []byte, nav []section) ([]byte, error) {
	md = comment.ReplaceAll(md, nil) // they are for tests
	maker := goldmark.New(goldmark.WithExtensions(extension.GFM), goldmark.WithRendererOptions(html.WithUnsafe()),
		goldmark.WithParserOptions(parser.WithAutoHeadingID(), parser.WithASTTransformers(util.Prioritized(links{path.Dir(name)}, 100))))
	var body bytes.Buffer
	if err := maker.Convert(md, &body, parser.WithContext(parser.NewContext(parser.WithIDs(make(anchors))))); err != nil {
		return nil, err
	}
	title, _, _ := strings.Cut(strings.TrimPrefix(string(md), "# "), "\n")
	wide := strings.NewReplacer("<table>", `<div class="wide"><table>`, "</table>", "</table></div>").Replace(body.String())
	var out bytes.Buffer
	err := pageTemplate.Execute(&out, page{title, nav, template.HTML(wide), fileOf(name)})
	return out.Bytes(), err
}

// links makes links to pages of the repository links to those of the site.
type links struct{ dir string }

// Transform implements [parser.ASTTransformer].
func (l links) Transform(doc *ast.Document, _ text.Reader, _ parser.Context) {
	_ = ast.Walk(doc, func(n ast.Node, entering bool) (ast.WalkStatus, error) {
		link, ok := n.(*ast.Link)
		if !ok || !entering {
			return ast.WalkContinue, nil
		}
		to, anchor, found := strings.Cut(string(link.Destination), "#")
		if to == "" || strings.Contains(to, ":") {
			return ast.WalkContinue, nil
		}
		if to = fileOf(path.Join(l.dir, to)); found {
			to += "#" + anchor
		}
		link.Destination = []byte(to)
		return ast.WalkContinue, nil
	})
}

// anchors names headings as GitHub does.
type anchors map[string]bool

// Generate implements [parser.IDs].
func (a anchors) Generate(value []byte, _ ast.NodeKind) []byte {
	id := strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case unicode.IsLetter(r) || unicode.IsDigit(r) || r == '-' || r == '_':
			return unicode.ToLower(r)
		}
		return -1
	}, string(value))
	unique := id
	for n := 1; a[unique]; n++ {
		unique = fmt.Sprintf("%s-%d", id, n)
	}
	a[unique] = true
	return []byte(unique)
}

// Put implements [parser.IDs].
func (a anchors) Put(value []byte) { a[string(value)] = true }
