package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// check makes a verifier with spin in the directory work, compiles and runs it.
func (c modelCase) check(ctx context.Context, dir, work string) (result, error) {
	file := c.model + ".pml"
	text, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return result{}, err
	}
	if err := os.WriteFile(filepath.Join(work, file), text, 0o600); err != nil {
		return result{}, err
	}
	if _, err := run(ctx, work, "spin", append(append([]string{"-a"}, c.spinArgs()...), file)...); err != nil {
		return result{}, err
	}
	if _, err := run(ctx, work, "cc", append(c.ccArgs(), "-o", "pan", "pan.c")...); err != nil {
		return result{}, err
	}
	began := time.Now()
	out, err := run(ctx, work, "./pan", c.panArgs()...)
	if err != nil {
		return result{}, err
	}
	r, err := parse(out)
	r.elapsed = time.Since(began)
	return r, err
}

// trail returns the steps to the error that check found in work.
func (c modelCase) trail(ctx context.Context, _, work string) (string, error) {
	args := append([]string{"-t", "-p", "-g", "-l"}, c.spinArgs()...)
	return run(ctx, work, "spin", append(args, c.model+".pml")...)
}

// run runs a command in work and returns what it printed.
func run(ctx context.Context, work, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = work
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, lastLine(string(out)))
	}
	return string(out), nil
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

// result is what a verifier printed.
type result struct {
	states, transitions, depth uint64
	errors                     uint64
	found                      string // the first error, as pan prints it
	cut                        string // why states were left out, "" if none were
	elapsed                    time.Duration
}

var (
	depthLine       = regexp.MustCompile(`State-vector \d+ byte, depth reached (\d+), errors: (\d+)`)
	statesLine      = regexp.MustCompile(`(?m)^ *(\d+) states, stored`)
	transitionsLine = regexp.MustCompile(`(?m)^ *(\d+) transitions`)
	foundLine       = regexp.MustCompile(`(?m)^pan:\d+: (.*?) \(at depth`)
	// A search that is not exhaustive says so in one of these ways.
	cutLine = regexp.MustCompile(`(?mi)max search depth too small|out of memory|MEMLIM bound|interrupted|bit statespace`)
)

var errNotPan = errors.New("the verifier printed no summary")

// parse reads pan's summary.
func parse(out string) (result, error) {
	var r result
	for _, f := range []struct {
		line *regexp.Regexp
		to   []*uint64
	}{
		{depthLine, []*uint64{&r.depth, &r.errors}},
		{statesLine, []*uint64{&r.states}},
		{transitionsLine, []*uint64{&r.transitions}},
	} {
		m := f.line.FindStringSubmatch(out)
		if m == nil {
			return r, fmt.Errorf("%w: %s", errNotPan, lastLine(out))
		}
		for i, to := range f.to {
			n, err := strconv.ParseUint(m[i+1], 10, 64)
			if err != nil {
				return r, fmt.Errorf("%w: %w", errNotPan, err)
			}
			*to = n
		}
	}
	if m := foundLine.FindStringSubmatch(out); m != nil {
		r.found = m[1]
	}
	r.cut = cutLine.FindString(out)
	if r.errors == 0 && r.cut == "" && strings.Contains(out, "Search not completed") {
		r.cut = "search not completed"
	}
	return r, nil
}

func (r result) outcome() string {
	if r.errors > 0 {
		return "found: " + r.found
	}
	return "no error, every state visited"
}

// wrong says how a result differs from what the case expects.
func (c modelCase) wrong(r result) string {
	switch {
	case r.cut != "":
		return "the search was cut short: " + r.cut
	case c.without == "" && r.errors > 0:
		return "a sound model has an error: " + r.found
	case c.without == "":
		return ""
	case r.errors == 0:
		return "nothing was found, and the rule is not needed"
	case c.live && !strings.HasPrefix(r.found, "acceptance cycle"),
		!c.live && !strings.HasPrefix(r.found, "assertion violated"):
		return "not the harm that was expected: " + r.found
	}
	return ""
}
