package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// moduleRoot is the module's directory.
const moduleRoot = "../.."

// message is a text of which govmm makes an error.
type message struct {
	pkg   string // the directory of its package, in the module
	text  string // with … where a value stands
	where string // file:line
}

// source is a file of govmm itself, parsed.
type source struct {
	pkg  string
	file *ast.File
}

// program parses all that is linked into govmm: no tests, and no packages for tests.
func program(t *testing.T, fset *token.FileSet) []source {
	var all []source
	err := filepath.WalkDir(moduleRoot, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			rel, err := filepath.Rel(moduleRoot, path)
			if err != nil {
				return err
			}
			if strings.HasPrefix(name, ".") && path != moduleRoot || name == "testdata" || forTests.MatchString(filepath.ToSlash(rel)) {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		file, err := parser.ParseFile(fset, path, nil, 0)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel(moduleRoot, filepath.Dir(path))
		all = append(all, source{filepath.ToSlash(dir), file})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// forTests are the directories that are not part of govmm.
var forTests = regexp.MustCompile(`^(test|bin|docs|guest|migrate/simtest|virtio/virtiotest|virtio/transport/transporttest|internal/(test[a-z]*|vmtest))$`)

// messages collects the texts of all errors: the format or text of each call of errors.New,
// of fmt.Errorf, and of each function of govmm that makes an error of a format and its values.
func messages(t *testing.T) []message {
	fset := token.NewFileSet()
	files := program(t, fset)
	makers, words := map[string]int{"errors.New": 0, "fmt.Errorf": 0}, map[string]string{}
	for _, f := range files {
		for _, d := range f.file.Decls {
			if vars, ok := d.(*ast.GenDecl); ok && vars.Tok == token.VAR {
				named(f, vars, words)
			}
			if fn, ok := d.(*ast.FuncDecl); ok {
				if at, ok := makesError(fn); ok {
					makers[f.pkg+"."+fn.Name.Name] = at // called in its own package
					makers[f.file.Name.Name+"."+fn.Name.Name] = at
				}
			}
		}
	}
	var all []message
	for _, f := range files {
		ast.Inspect(f.file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			name := ""
			switch fun := call.Fun.(type) {
			case *ast.Ident:
				name = f.pkg + "." + fun.Name
			case *ast.SelectorExpr:
				if x, ok := fun.X.(*ast.Ident); ok {
					name = x.Name + "." + fun.Sel.Name
				}
				if _, ok := makers[name]; !ok {
					name = f.pkg + "." + fun.Sel.Name // a method of its own package
				}
			}
			at, ok := makers[name]
			if !ok || at >= len(call.Args) {
				return true
			}
			if text, ok := textOf(f.pkg, call.Args[at], call.Args[at+1:], words); ok {
				p := fset.Position(call.Pos())
				all = append(all, message{f.pkg, text, fmt.Sprintf("%s:%d", strings.TrimPrefix(filepath.ToSlash(p.Filename), moduleRoot+"/"), p.Line)})
			}
			return true
		})
	}
	slices.SortFunc(all, func(a, b message) int {
		return strings.Compare(a.pkg+"\x00"+a.text, b.pkg+"\x00"+b.text)
	})
	return all
}

// makesError is for a function that ends in (format string, args ...any) and returns an error;
// at is where the format stands.
func makesError(fn *ast.FuncDecl) (at int, ok bool) {
	if fn.Type.Results == nil || fn.Type.Params.NumFields() < 2 {
		return 0, false
	}
	returns := false
	for _, r := range fn.Type.Results.List {
		id, is := r.Type.(*ast.Ident)
		returns = returns || is && id.Name == "error"
	}
	var kinds []string
	for _, p := range fn.Type.Params.List {
		kind := ""
		switch p := p.Type.(type) {
		case *ast.Ident:
			kind = p.Name
		case *ast.Ellipsis:
			if id, is := p.Elt.(*ast.Ident); is {
				kind = "..." + id.Name
			}
		}
		for range max(1, len(p.Names)) {
			kinds = append(kinds, kind)
		}
	}
	n := len(kinds)
	return n - 2, returns && kinds[n-1] == "...any" && kinds[n-2] == "string"
}

// named notes the words of the errors that variables hold: var ErrX = errors.New("…").
func named(f source, vars *ast.GenDecl, words map[string]string) {
	for _, spec := range vars.Specs {
		v := spec.(*ast.ValueSpec)
		for i, value := range v.Values {
			call, ok := value.(*ast.CallExpr)
			if !ok || len(call.Args) != 1 {
				continue
			}
			if text, ok := call.Args[0].(*ast.BasicLit); ok && text.Kind == token.STRING {
				s, err := strconv.Unquote(text.Value)
				if err == nil {
					words[f.pkg+"."+v.Names[i].Name] = s
					words[f.file.Name.Name+"."+v.Names[i].Name] = s
				}
			}
		}
	}
}

var (
	verb  = regexp.MustCompile(`%[-+# 0]*(\[\d+\])?[0-9*]*(\.[0-9*]+)?[a-zA-Z%]`)
	blank = regexp.MustCompile(`\s+`)
)

// textOf returns the literals of an expression, with … for all else. A verb whose value is a
// variable that holds an error has that one's words.
func textOf(pkg string, e ast.Expr, values []ast.Expr, words map[string]string) (string, bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		if e.Kind != token.STRING {
			return "", false
		}
		s, err := strconv.Unquote(e.Value)
		at := -1
		s = verb.ReplaceAllStringFunc(s, func(v string) string {
			if v == "%%" {
				return "%"
			}
			at++
			if at < len(values) && !strings.ContainsAny(v, "[*") {
				if s := words[variableName(pkg, values[at])]; s != "" {
					return s
				}
			}
			return "…"
		})
		return blank.ReplaceAllString(s, " "), err == nil
	case *ast.BinaryExpr:
		a, ok := textOf(pkg, e.X, values, words)
		b, also := textOf(pkg, e.Y, nil, words)
		if !ok {
			a = "…"
		}
		if !also {
			b = "…"
		}
		return a + b, ok || also
	case *ast.ParenExpr:
		return textOf(pkg, e.X, values, words)
	}
	return "", false
}

// variableName is the name of a variable, with its package.
func variableName(pkg string, e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return pkg + "." + e.Name
	case *ast.SelectorExpr:
		if x, ok := e.X.(*ast.Ident); ok {
			return x.Name + "." + e.Sel.Name
		}
	}
	return ""
}
