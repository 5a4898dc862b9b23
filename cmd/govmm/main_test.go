package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"
)

// runAsGovmm makes the test binary be govmm.
const runAsGovmm = "GOVMM_TEST_RUN_AS_GOVMM"

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == readDisk {
		os.Exit(serveDisk())
	}
	if os.Getenv(runAsGovmm) != "" {
		forbidden()
		panics := make(chan os.Signal, 1)
		signal.Notify(panics, syscall.SIGUSR1)
		go func() {
			<-panics
			panic("on purpose")
		}()
		addHanging()
		main()
	}
	os.Exit(m.Run())
}

// cli is govmm on a machine of its own: a runtime directory.
type cli struct {
	t   *testing.T
	dir string
	env []string // what its processes have besides
}

func newCLI(t *testing.T) *cli {
	dir, err := os.MkdirTemp("", "govmm-cli-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return &cli{t: t, dir: dir}
}

func (c *cli) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = c.environ()
	return cmd
}

func (c *cli) environ() []string {
	return append(append(append(os.Environ(), "XDG_STATE_HOME="+c.dir), c.env...), runAsGovmm+"=1", "GORACE=atexit_sleep_ms=0", "XDG_RUNTIME_DIR="+c.dir)
}

// run runs one command to its end.
func (c *cli) run(args ...string) (exit int, stdout, stderr string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := c.command(ctx, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var status *exec.ExitError
	if err != nil && !errors.As(err, &status) || ctx.Err() != nil {
		c.t.Fatalf("govmm %s: %v", strings.Join(args, " "), err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// oneLine checks that stderr is one line of govmm's, with words in it.
func oneLine(t *testing.T, stderr string, words ...string) {
	t.Helper()
	if !strings.HasPrefix(stderr, "govmm: ") || strings.Count(stderr, "\n") != 1 || strings.Contains(stderr, "goroutine") {
		t.Errorf("not one line: %q", stderr)
	}
	for _, w := range words {
		if !strings.Contains(stderr, w) {
			t.Errorf("%q is missing from %q", w, stderr)
		}
	}
}

func TestUsageErrors(t *testing.T) {
	c := newCLI(t)
	for _, tc := range []struct{ args, words string }{
		{"frobnicate", `unknown command "frobnicate"`},
		{"paus", "did you mean ps or pause"},
		{"--frob", "unknown flag: --frob"},
		{"run --frob", "run: unknown flag"},
		{"run a b", "one NAME"},
		{"run ../a", "must be 1 to 64"},
		{"run .a", "must be 1 to 64"},
		{"run --cpus 0", "--cpus"},
		{"run --cpus -1", "--cpus"},
		{"run --cpus x", "--cpus"},
		{"run --memory 0", "--memory"},
		{"run --memory 1.5G", "--memory"},
		{"run --memory 16777216T", "--memory"},
		{"run --memory -1", "--memory"},
		{"run --memory 1000", "--memory"},
		{"run --memory 32T", "--memory"},
		{"run --memory-backing floppy", "--memory-backing"},
		{"run --vsock path=x,cid=2", "vsock"},
		{"run --vsock cid=3", "path=PATH is missing"},
		{"receive --listen 127.0.0.1:0 --vsock path=x,port=1", "\"port\" is unknown"},
		{"run --serial pigeon", "--serial"},
		{"run --serial file:", "--serial"},
		{"receive", "--listen"},
		{"receive --listen here", "HOST:PORT"},
		{"receive --listen h:70000", "HOST:PORT"},
		{"receive --listen h:http", "HOST:PORT"},
		{"receive --listen unix:", "PATH"},
		{"receive --listen :0", "--tls-dir DIR, a loopback address or unix:PATH, or --insecure"},
		{"receive --listen 0.0.0.0:0", "or --insecure"},
		{"receive --listen [::]:0", "or --insecure"},
		{"certs", "init or issue"},
		{"certs make", "init or issue"},
		{"certs init", "one DIR"},
		{"certs init a b", "one DIR"},
		{"certs init a --days 0", "--days"},
		{"certs issue a", "at least one HOST"},
		{"certs issue a ../b", "DNS name"},
		{"certs issue a b,*.c", "DNS name"},
		{"certs issue a b --days 36501", "--days"},
		{"receive --listen 127.0.0.1:0 --serial x", "--serial"},
		{"receive a b --listen 127.0.0.1:0", "one NAME"},
		{"migrate", "--to HOST:PORT is missing"},
		{"migrate --to here", "HOST:PORT"},
		{"migrate --to h:0", "HOST:PORT"},
		{"migrate --to unix:", "unix:PATH"},
		{"migrate --to unix:/x --tls-dir d", "--tls-server-name"},
		{"migrate --to h:1 --tls-server-name h", "needs --tls-dir"},
		{"migrate --to h:1 --tls-dir d --tls-server-name *.h", "server name"},
		{"receive --listen :0 --tls-dir d --insecure", "exclude"},
		{"receive --listen 127.0.0.1:0 --tls-allow h", "needs --tls-dir"},
		{"receive --listen :0 --tls-dir d --tls-allow a/b", "--tls-allow \"a/b\""},
		{"migrate --to h:1 --cancel", "exclude"},
		{"migrate --to h:1 --downtime-limit 0", "--downtime-limit"},
		{"migrate --to h:1 --downtime-limit 300", "--downtime-limit"},
		{"migrate --to h:1 --downtime-limit 1us", "downtime limit"},
		{"migrate --to h:1 --timeout -1s", "--timeout"},
		{"migrate --to h:1 --bandwidth-limit fast", "--bandwidth-limit"},
		{"migrate --to h:1 --bandwidth-limit 1", "bandwidth limit"},
		{"migrate --to h:1 --max-rounds -1", "max rounds"},
		{"migrate --to h:1 --clear-bitmap-shift 5", "between 6 and 31"},
		{"migrate --to h:1 --clear-bitmap-shift 32", "between 6 and 31"},
		{"migrate --to h:1 --clear-bitmap-shift 0", "between 6 and 31"},
		{"migrate --to h:1 --progress loud", "expected auto or none"},
		{"migrate a b --to h:1", "one NAME"},
		{"ps a b", "one NAME"},
		{"info /x", "must be 1 to 64"},
		{"pause --force", "unknown flag"},
		{"resume --force=maybe", "--force"},
		{"stop a b", "one NAME"},
		{"demo now", "no argument"},
		{"version now", "no argument"},
		{"completion", "bash"},
		{"completion csh", "csh"},
	} {
		exit, stdout, stderr := c.run(strings.Fields(tc.args)...)
		if exit != exitUsage || stdout != "" {
			t.Errorf("govmm %s: exit %d, stdout %q", tc.args, exit, stdout)
		}
		oneLine(t, stderr, tc.words)
	}
	if exit, stdout, stderr := c.run(); exit != exitUsage || stdout != "" || !strings.Contains(stderr, "Usage:") {
		t.Errorf("govmm alone: exit %d, %q, %q", exit, stdout, stderr)
	}
}

func TestNothingRuns(t *testing.T) {
	c := newCLI(t)
	for _, args := range []string{
		"info", "info db", "pause db", "resume db --force", "stop db", "stop --api-socket /nonexistent/x.sock", "ps db",
		"migrate db --to h:1", "migrate db --cancel", "config --from db",
	} {
		exit, stdout, stderr := c.run(strings.Fields(args)...)
		if exit != exitFailed || stdout != "" {
			t.Errorf("govmm %s: exit %d, stdout %q", args, exit, stdout)
		}
		if oneLine(t, stderr, args[:strings.IndexAny(args+" ", " ")], "runs", "govmm ps"); strings.Count(stderr, "govmm ps") != 1 {
			t.Errorf("advised twice: %q", stderr)
		}
	}
	if exit, stdout, stderr := c.run("ps"); exit != 0 || !strings.HasPrefix(stdout, "NAME") || strings.Count(stdout, "\n") != 1 || stderr != "" {
		t.Errorf("ps: %d %q %q", exit, stdout, stderr)
	}
	if exit, stdout, _ := c.run("ps", "--json"); exit != 0 || stdout != "[]\n" {
		t.Errorf("ps --json: %d %q", exit, stdout)
	}
}

// migrate --json prints its object even if there is nothing to migrate.
func TestMigrateJSONWithoutVM(t *testing.T) {
	c := newCLI(t)
	for _, args := range [][]string{
		{"migrate", "db", "--to", "127.0.0.1:1", "--json"},
		{"migrate", "--to", "127.0.0.1:1", "--json"},
		{"migrate", "--cancel", "--json"},
	} {
		exit, stdout, stderr := c.run(args...)
		if exit != exitFailed {
			t.Errorf("%v: exit %d", args, exit)
		}
		oneLine(t, stderr)
		checkResult(t, stdout, "failed")
	}
}

// checkResult checks the shape that scripts rely on.
func checkResult(t *testing.T, stdout, status string) map[string]any {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(stdout))
	var v map[string]any
	if err := dec.Decode(&v); err != nil || dec.More() {
		t.Fatalf("not one JSON object: %q", stdout)
	}
	keys := []string{"status", "error", "total_ms", "setup_ms", "downtime_ms", "bytes_sent", "ram_bytes",
		"downtime", "guest_resets", "stops_undone", "trial_stops", "throttle_percent", "pages_sent", "pages_zero", "pages_hole", "pages_hinted", "rounds",
		"hints_received", "hints_late", "hints_rewritten", "hint_wait_ms", "hints_off",
		"channels", "channel_bytes", "compression", "compression_ratio"}
	for _, key := range keys {
		if _, ok := v[key]; !ok {
			t.Errorf("%q is missing from %s", key, stdout)
		}
	}
	if len(v) != len(keys) {
		t.Errorf("%d keys in %s", len(v), stdout)
	}
	if _, ok := v["rounds"].([]any); !ok {
		t.Errorf("rounds is no array: %s", stdout)
	}
	if v["status"] != status || (v["error"] == "") != (status == "completed") {
		t.Errorf("status %v, error %q; want %s", v["status"], v["error"], status)
	}
	return v
}

func TestVersion(t *testing.T) {
	defer func(v string) { gitVersion = v }(gitVersion)
	for v, want := range map[string]string{
		"v0.2.0": "v0.2.0 go", "v0.1.0-3-g0123456-dirty": "v0.1.0-3-g0123456-dirty go", "0123456-dirty": "v" + release + "+0123456-dirty go", "": "v" + release,
	} {
		if gitVersion = v; !strings.HasPrefix(version(), want) {
			t.Errorf("%q: %q, want %q", v, version(), want)
		}
	}
}

func TestVersionAndCompletion(t *testing.T) {
	c := newCLI(t)
	for _, args := range []string{"version", "--version"} {
		if exit, stdout, stderr := c.run(args); exit != 0 || !strings.HasPrefix(stdout, "govmm ") || strings.Count(stdout, "\n") != 1 || stderr != "" {
			t.Errorf("%s: %d %q %q", args, exit, stdout, stderr)
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if exit, stdout, _ := c.run("completion", shell); exit != 0 || !strings.Contains(stdout, "govmm") {
			t.Errorf("completion %s: exit %d", shell, exit)
		}
	}
	if exit, stdout, _ := c.run("migrate", "--help"); exit != 0 || strings.Contains(stdout, "verify-pages") || !strings.Contains(stdout, "--downtime-limit") {
		t.Errorf("migrate --help: %d %q", exit, stdout)
	}
}
