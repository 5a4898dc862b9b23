// Command run is `go test` with a rule: on a machine where /dev/kvm opens, a
// skipped test is a failure, unless its reason says "needs VT-x or SVM". So a
// test that silently stopped testing cannot pass. It takes go test's
// arguments, prints what failed in full and one line for everything else.
//
//	go run ./test/run -race ./...
//
// With the one argument -svm it runs a choice of the tests on an emulated
// machine with KVM instead, with -svm=short a smaller one, with -svm=absent
// that if there is no KVM here, and with -svm=accept those with the tag accept that need VT-x or
// SVM. No test may be skipped there.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/test/kernel"
)

// allowed is what the reason of a skip contains if it may be skipped where KVM
// is: what a software KVM cannot do.
const allowed = "needs VT-x or SVM"

func main() {
	r := report{out: os.Stdout, pending: map[testID]*strings.Builder{}}
	kvm := testenv.NoKVM()
	var err error
	switch arg := strings.Join(os.Args[1:], " "); {
	case arg == "-svm=absent" && kvm == nil:
		loud("/dev/kvm opens: the tests have run on it, not on an emulated machine")
		return
	case arg == "-svm=absent", arg == "-svm=short":
		r.strict = true
		err = onSVM(&r, short, kernel.NoACPI)
	case arg == "-svm=accept":
		r.strict = true
		err = onSVM(&r, accept)
	case arg == "-svm":
		r.strict = true
		err = onSVM(&r, long, kernel.NoACPI, kernel.ACPI)
	default:
		if kvm != nil {
			loud(fmt.Sprintf("%v: tests that need KVM are skipped, and prove nothing here", kvm))
		}
		err = r.goTest(os.Args[1:]...)
	}
	bad := r.summary(kvm == nil)
	if err != nil {
		fmt.Fprintln(os.Stderr, "test/run:", err)
	}
	if err != nil || bad {
		os.Exit(1)
	}
}

// goTest runs go test and reports what it says.
func (r *report) goTest(args ...string) error {
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return err
	}
	err = r.read(stdout)
	if wait := cmd.Wait(); err == nil {
		err = wait
	}
	if err != nil {
		return fmt.Errorf("go test: %w", err)
	}
	return nil
}

func loud(s string) { fmt.Println("!!!!!!!! " + s + " !!!!!!!!") }

// testEvent is a line of go test -json (go doc test2json).
type testEvent struct {
	Action  string
	Package string
	Test    string
	Output  string
}

type testID struct{ pkg, test string }

// report prints what happens and remembers what was skipped.
type report struct {
	out     io.Writer
	pending map[testID]*strings.Builder // output of tests that have not ended
	passed  int
	failed  []testID
	skips   []skip
	strict  bool // KVM and SVM are there: nothing may be skipped
}

type skip struct {
	testID
	reason string
}

func (r *report) read(in io.Reader) error {
	s := bufio.NewScanner(in)
	s.Buffer(nil, 16<<20)
	for s.Scan() {
		var e testEvent
		if err := json.Unmarshal(s.Bytes(), &e); err != nil {
			_, _ = fmt.Fprintln(r.out, s.Text()) // not go test's: a tool's complaint
			continue
		}
		r.event(e)
	}
	return s.Err()
}

func (r *report) event(e testEvent) {
	id := testID{e.Package, e.Test}
	if e.Test == "" {
		r.packageEvent(e)
		return
	}
	if r.pending[id] == nil {
		r.pending[id] = &strings.Builder{}
	}
	switch e.Action {
	case "output":
		r.pending[id].WriteString(e.Output)
		return
	case "pass":
		r.passed++
		if !strings.Contains(e.Test, "/") {
			r.print(resultLine(r.pending[id].String()))
		}
	case "fail":
		r.failed = append(r.failed, id)
		r.print(r.pending[id].String())
	case "skip":
		r.skips = append(r.skips, skip{id, reason(r.pending[id].String())})
		r.print(r.pending[id].String())
	default:
		return
	}
	delete(r.pending, id)
}

// packageEvent handles what belongs to no test. When a package has failed, the
// output of the tests that never ended (a panic, a timeout) says why.
func (r *report) packageEvent(e testEvent) {
	switch e.Action {
	case "output", "build-output":
		if e.Output != "PASS\n" {
			r.print(e.Output)
		}
	case "fail":
		for id, out := range r.pending {
			if id.pkg == e.Package {
				r.print(out.String())
				delete(r.pending, id)
			}
		}
	}
}

func (r *report) print(s string) { _, _ = io.WriteString(r.out, s) }

// resultLine picks "--- PASS: ..." out of a test's output.
func resultLine(out string) string {
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "--- ") {
			return line
		}
	}
	return ""
}

// reason is a skipped test's output without the framework's own lines.
func reason(out string) string {
	var words []string
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "=== ") && !strings.HasPrefix(line, "--- ") {
			words = append(words, line)
		}
	}
	return strings.Join(words, " ")
}

// summary prints the counts and, where KVM is, says whether a test was skipped
// that may not be.
func (r *report) summary(kvm bool) (bad bool) {
	_, _ = fmt.Fprintf(r.out, "%d tests passed, %d failed, %d were skipped\n", r.passed, len(r.failed), len(r.skips))
	for _, id := range r.failed {
		_, _ = fmt.Fprintf(r.out, "FAIL: %s %s\n", id.pkg, id.test)
	}
	if !kvm && !r.strict {
		return false
	}
	wrong := slices.DeleteFunc(slices.Clone(r.skips), func(s skip) bool { return !r.strict && strings.Contains(s.reason, allowed) })
	for _, s := range wrong {
		_, _ = fmt.Fprintf(r.out, "FAIL: %s %s was skipped although /dev/kvm opens: %s\n", s.pkg, s.test, s.reason)
	}
	return len(wrong) > 0
}
