package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	const stream = `{"Action":"start","Package":"p"}
{"Action":"run","Package":"p","Test":"TestGood"}
{"Action":"output","Package":"p","Test":"TestGood","Output":"=== RUN   TestGood\n"}
{"Action":"output","Package":"p","Test":"TestGood","Output":"    chatter\n"}
{"Action":"output","Package":"p","Test":"TestGood","Output":"--- PASS: TestGood (0.01s)\n"}
{"Action":"pass","Package":"p","Test":"TestGood"}
{"Action":"output","Package":"p","Test":"TestBad","Output":"    a.go:1: why\n"}
{"Action":"output","Package":"p","Test":"TestBad","Output":"--- FAIL: TestBad (0.01s)\n"}
{"Action":"fail","Package":"p","Test":"TestBad"}
{"Action":"output","Package":"p","Test":"TestSVM","Output":"    a.go:2: needs VT-x or SVM: nested state\n"}
{"Action":"skip","Package":"p","Test":"TestSVM"}
{"Action":"output","Package":"p","Test":"TestLazy","Output":"    a.go:3: not today\n"}
{"Action":"skip","Package":"p","Test":"TestLazy"}
{"Action":"output","Package":"p","Test":"TestHangs","Output":"panic: test timed out\n"}
{"Action":"output","Package":"p","Output":"FAIL\tp\t0.1s\n"}
{"Action":"fail","Package":"p"}
not json
`
	var out strings.Builder
	r := report{out: &out, pending: map[testID]*strings.Builder{}}
	if err := r.read(strings.NewReader(stream)); err != nil {
		t.Fatal(err)
	}
	if !r.summary(true) {
		t.Error("a test was skipped, and that passes")
	}
	for _, want := range []string{"--- PASS: TestGood", "why", "FAIL\tp", "test timed out", "not json",
		"1 tests passed, 1 failed, 2 were skipped\nFAIL: p TestBad\n",
		"FAIL: p TestLazy was skipped although /dev/kvm opens: a.go:3: not today"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing from:\n%s", want, &out)
		}
	}
	for _, unwanted := range []string{"chatter", "FAIL: p TestSVM"} {
		if strings.Contains(out.String(), unwanted) {
			t.Errorf("%q is in:\n%s", unwanted, &out)
		}
	}
	out.Reset()
	if r.summary(false) || strings.Contains(out.String(), "TestLazy") {
		t.Errorf("without KVM skips are not failures:\n%s", &out)
	}
	r.strict = true
	if !r.summary(false) || !strings.Contains(out.String(), "FAIL: p TestSVM") {
		t.Errorf("on the emulated machine no skip is accepted:\n%s", &out)
	}
}

// TestChoice: each test that runs on the emulated machine, or is left out there, exists.
func TestChoice(t *testing.T) {
	name := regexp.MustCompile(`Test\w+`)
	for _, p := range append(slices.Clone(short), long...) {
		names := name.FindAllString(p.run, -1)
		for _, s := range p.skip {
			names = append(names, s.name)
		}
		var source strings.Builder
		files, err := filepath.Glob(filepath.Join("../..", p.pkg, "*_test.go"))
		if err != nil || files == nil {
			t.Fatalf("%s: %d files with tests, %v", p.pkg, len(files), err)
		}
		for _, f := range files {
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			source.Write(text)
		}
		for _, n := range names {
			if !strings.Contains(source.String(), "func "+n+"(") {
				t.Errorf("%s has no %s", p.pkg, n)
			}
		}
	}
}

func TestArguments(t *testing.T) {
	p := part{pkg: "./p", run: "^TestA$", skip: []leftOut{{"TestB", "slow"}, {"TestC", "slow"}}}
	got := strings.Join(p.arguments("/bin/svm"), " ")
	for _, want := range []string{"-exec /bin/svm -timeout", "-run ^TestA$", "-skip ^(TestB|TestC)$ ./p"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in %q", want, got)
		}
	}
}
