// Command model checks the models of this directory with spin. In the sound models
// spin visits every state, and none may violate an assertion. Each variant leaves out
// one rule, and spin must find a violation. The command prints a table, or with -trail
// the shortest way to the violation of one variant (docs/proof.md).
//
//	go run ./test/model
//	go run ./test/model -trail NO_R3_SINCE
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

func main() {
	dir := flag.String("dir", "test/model", "directory of the models")
	trail := flag.String("trail", "", "print the trail of the variant that leaves this rule out")
	only := flag.String("run", "", "check only the cases whose name has this in it")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if *trail != "" {
		if err := printTrail(ctx, *dir, *trail); err != nil {
			fail(err)
		}
		return
	}
	var chosen []modelCase
	for _, c := range cases {
		if strings.Contains(c.name(), *only) {
			chosen = append(chosen, c)
		}
	}
	if len(chosen) == 0 {
		fail(fmt.Errorf("no case has %q in its name", *only))
	}
	if !checkAll(ctx, *dir, chosen) {
		os.Exit(1)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "model:", err)
	os.Exit(1)
}

// printTrail runs one variant and prints its trail.
func printTrail(ctx context.Context, dir, without string) error {
	for _, c := range cases {
		if c.without != without {
			continue
		}
		work, err := os.MkdirTemp("", "govmm-model-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(work)
		if r, err := c.check(ctx, dir, work); err != nil {
			return err
		} else if why := c.wrong(r); why != "" {
			return fmt.Errorf("%s without %s: %s", c.model, without, why)
		}
		out, err := c.trail(ctx, dir, work)
		fmt.Print(out)
		return err
	}
	return fmt.Errorf("no variant leaves out %q", without)
}

// checkAll runs cases, two at a time, and reports whether all were right.
func checkAll(ctx context.Context, dir string, cases []modelCase) bool {
	const workers = 2
	lines := make([]string, len(cases))
	next := make(chan int)
	good := true
	var mu sync.Mutex // guards good
	var wg sync.WaitGroup
	began := time.Now()
	for range workers {
		wg.Go(func() {
			for i := range next {
				line, ok := checkOne(ctx, dir, cases[i])
				lines[i] = line
				fmt.Fprintf(os.Stderr, "model: %d of %d: %s\n", i+1, len(cases), strings.ReplaceAll(line, "\t", "  "))
				mu.Lock()
				good = good && ok
				mu.Unlock()
			}
		})
	}
	for i := range cases {
		next <- i
	}
	close(next)
	wg.Wait()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(w, "model\tvariant\tstates\ttransitions\tdepth\ttime\toutcome")
	for _, line := range lines {
		_, _ = fmt.Fprintln(w, line)
	}
	_ = w.Flush()
	verdict := "every model came out as it must"
	if !good {
		verdict = "WRONG, see above"
	}
	fmt.Printf("%s; %v\n", verdict, time.Since(began).Round(time.Second))
	return good
}

func checkOne(ctx context.Context, dir string, c modelCase) (line string, ok bool) {
	var r result
	work, err := os.MkdirTemp("", "govmm-model-")
	if err == nil {
		defer os.RemoveAll(work)
		r, err = c.check(ctx, dir, work)
	}
	outcome := r.outcome()
	if err != nil {
		outcome = "WRONG: " + err.Error()
	} else if why := c.wrong(r); why != "" {
		outcome = "WRONG: " + why
		err = fmt.Errorf("%s", why)
	}
	return strings.Join([]string{c.model, c.variant(), fmt.Sprint(r.states), fmt.Sprint(r.transitions),
		fmt.Sprint(r.depth), fmt.Sprintf("%.1f s", r.elapsed.Seconds()), outcome}, "\t"), err == nil
}
