package main

import (
	"errors"
	"maps"
	"os"
	"strings"
	"testing"
)

// What pan 6.5.2 printed, shortened in the middle.
const (
	complete = `
(Spin Version 6.5.2 -- 6 December 2019)
	+ Partial Order Reduction
	+ Compression

Full statespace search for:
	never claim         	- (none specified)
	assertion violations	+
	invalid end states	+

State-vector 36 byte, depth reached 3674, errors: 0
     9529 states, stored
    32356 states, matched
    41885 transitions (= stored+matched)
    49031 atomic steps
hash conflicts:         5 (resolved)
`
	violated = `pan:1: assertion violated  (same||spare) (at depth 18)
pan: wrote hints.pml.trail

(Spin Version 6.5.2 -- 6 December 2019)
Warning: Search not completed
	+ Breadth-First Search

Full statespace search for:
State-vector 28 byte, depth reached 18, errors: 1
      955 states, stored
     1200 transitions (= stored+matched)
`
)

var (
	sound   = modelCase{model: "hints"}
	broken  = modelCase{model: "hints", without: "NO_R1"}
	starved = modelCase{model: "handoff", without: "NO_ASKING", live: true}
)

func TestParse(t *testing.T) {
	r, err := parse(complete)
	if err != nil || r.states != 9529 || r.transitions != 41885 || r.depth != 3674 || r.errors != 0 || r.cut != "" {
		t.Fatalf("%+v, %v", r, err)
	}
	r, err = parse(violated)
	if err != nil || r.errors != 1 || r.found != "assertion violated  (same||spare)" || r.cut != "" {
		t.Fatalf("%+v, %v", r, err)
	}
	if _, err := parse("pan: no such file\n"); !errors.Is(err, errNotPan) {
		t.Fatalf("no summary: %v", err)
	}
}

func TestVerdicts(t *testing.T) {
	cycle := strings.Replace(violated, "assertion violated  (same||spare)", "acceptance cycle", 1)
	deadlock := strings.Replace(violated, "assertion violated  (same||spare)", "invalid end state", 1)
	for _, c := range []struct {
		name string
		c    modelCase
		out  string
		want string // part of what is wrong; "": nothing is
	}{
		{"sound", sound, complete, ""},
		{"sound with an error", sound, violated, "a sound model has an error"},
		{"sound with a deadlock", sound, deadlock, "invalid end state"},
		{"broken and found", broken, violated, ""},
		{"broken and not found", broken, complete, "nothing was found"},
		{"broken, something else found", broken, deadlock, "not the harm"},
		{"starved and found", starved, cycle, ""},
		{"starved, something else found", starved, violated, "not the harm"},
		{"too deep", sound, "error: max search depth too small\n" + complete, "cut short"},
		{"too much memory", sound, "pan: reached -DMEMLIM bound\n" + complete, "cut short"},
		{"out of memory", sound, "pan: out of memory\n" + complete, "cut short"},
		{"given up", sound, "Warning: Search not completed\n" + complete, "cut short"},
		{"approximate", sound, strings.Replace(complete, "Full statespace", "Bit statespace", 1), "cut short"},
	} {
		r, err := parse(c.out)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if got := c.c.wrong(r); (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// Each rule that a model can leave out is left out by a case, and each case leaves out
// a rule that its model has.
func TestEveryRuleIsLeftOut(t *testing.T) {
	for _, model := range []string{"hints", "handoff", "missing"} {
		text, err := os.ReadFile(model + ".pml")
		if err != nil {
			t.Fatal(err)
		}
		have := map[string]bool{}
		for _, word := range strings.FieldsFunc(string(text), func(r rune) bool {
			return r != '_' && (r < 'A' || r > 'Z') && (r < '0' || r > '9')
		}) {
			if strings.HasPrefix(word, "NO_") && word != "NO_" || word == "FORCE" {
				have[word] = true
			}
		}
		left := maps.Clone(have)
		for _, c := range cases {
			if c.model == model && c.without != "" {
				if !have[c.without] {
					t.Errorf("%s does not know %s", model, c.without)
				}
				delete(left, c.without)
			}
		}
		for rule := range left {
			t.Errorf("no case leaves out %s of %s", rule, model)
		}
	}
}
