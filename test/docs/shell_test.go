package docs

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
)

// shell is the bash of a page.
type shell struct {
	t     *testing.T
	in    io.Writer
	lines chan string // what it prints, stdout and stderr; closed at its end
	dir   string      // its home
	jobs  []job
	ended int // of jobs, those whose output was compared
}

// job is a command that stays in the background.
type job struct {
	step step
	file string // what it prints
}

// setUp makes the namespaces what a reader's host is: with its loopback, with directories that
// are empty, and with the processes of the page only.
const setUp = `mount --make-rprivate / && mount -t proc proc /proc && mount -t tmpfs tmpfs /srv && mount -t tmpfs tmpfs /run && ip link set lo up && exec 2>&1
stop_all() { govmm ps | tail -n +2 | while read -r name _; do govmm stop --force "$name"; done; }`

// newShell starts a bash with namespaces of its own, which ends with all that it has started.
func newShell(t *testing.T, govmm string) *shell {
	dir, err := os.MkdirTemp("", "gd") // a short path: it holds sockets
	testenv.Check(t, err)
	testenv.Check(t, os.Mkdir(dir+"/bin", 0o755))
	testenv.Check(t, os.Link(govmm, dir+"/bin/govmm"))
	cmd := exec.Command("bash", "--norc")
	cmd.Dir = dir
	cmd.Env = []string{"HOME=" + dir, "PATH=" + dir + "/bin:" + os.Getenv("PATH"), "XDG_STATE_HOME=" + dir + "/state", "LC_ALL=C.UTF-8", "GOTRACEBACK=all"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID, Setpgid: true, Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	testenv.Check(t, err)
	out, err := cmd.StdoutPipe()
	testenv.Check(t, err)
	cmd.Stderr = cmd.Stdout
	testenv.Check(t, cmd.Start())
	s := &shell{t: t, in: in, lines: make(chan string), dir: dir}
	go func() {
		defer close(s.lines)
		for r := bufio.NewScanner(out); r.Scan(); {
			s.lines <- r.Text()
		}
	}()
	t.Cleanup(func() {
		for _, j := range s.jobs {
			if out, err := os.ReadFile(j.file); err == nil && t.Failed() {
				t.Logf("line %d: $ %s\n%s", j.step.line, j.step.command, out)
			}
		}
		_ = in.Close() // the first process of its namespace: all others end with it
		_ = cmd.Process.Kill()
		for range s.lines {
		}
		_ = cmd.Wait()
		_ = os.RemoveAll(dir)
	})
	if out, status, err := s.run(setUp); err != nil || status != 0 {
		t.Fatalf("set up the namespaces: %v, status %d\n%s", err, status, out)
	}
	return s
}

const endOfOutput = "--end-of-output--"

// run runs a command to its end and returns what it has printed.
func (s *shell) run(command string) (out string, status int, err error) {
	if _, err := fmt.Fprintf(s.in, "%s\nstatus=$?; echo; echo %s $status\n", command, endOfOutput); err != nil {
		return "", 0, err
	}
	limit := time.After(testenv.Patience)
	for {
		select {
		case line, ok := <-s.lines:
			if !ok {
				return out, 0, errors.New("bash has ended")
			}
			if _, err := fmt.Sscanf(line, endOfOutput+" %d", &status); err == nil {
				return strings.TrimSuffix(out, "\n"), status, nil
			}
			out += line + "\n"
		case <-limit:
			return out, 0, fmt.Errorf("it does not end; so far it has printed:\n%s", out)
		}
	}
}

var (
	stays = regexp.MustCompile(`^(XDG_[A-Z_]+=\S+ )?govmm (run|receive|console)\b`)
	ready = regexp.MustCompile(`(?m)API socket is|listening on|^\{"listening`)
	fails = regexp.MustCompile(`(?m)^govmm: (run|receive|migrate|upgrade|migrations|report|events|console|snapshot|dirty-rate|ps|info|pause|resume|stop|balloon|config|image|certs|completion)\b.*: |100% packet loss`)
	shows = regexp.MustCompile(`^cat ([a-z.]+)$`)
)

// step runs one command and compares what it does with what the page says. A file that the
// page shows by cat, and that is not there, is made.
func (s *shell) step(st step) error {
	command, background := strings.CutSuffix(st.command, " &")
	wantFailure := false
	for _, l := range st.output {
		wantFailure = wantFailure || fails.MatchString(l)
	}
	if m := shows.FindStringSubmatch(command); m != nil {
		if f, err := os.OpenFile(filepath.Join(s.dir, m[1]), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644); err == nil {
			_, err = f.WriteString(strings.Join(st.output, "\n") + "\n")
			return errors.Join(err, f.Close())
		}
	}
	if command == "stop_all" { // what was started before is complete
		if err := s.end(); err != nil {
			return err
		}
	}
	if background || stays.MatchString(command) && !wantFailure {
		return s.background(command, st)
	}
	out, status, err := s.run(command)
	switch {
	case err != nil:
		return err
	case (status != 0) != wantFailure:
		return fmt.Errorf("status %d, printed:\n%s", status, out)
	}
	return s.compare(st.output, out)
}

// background starts a command that stays, and waits until it is ready.
func (s *shell) background(command string, st step) error {
	j := job{st, filepath.Join(s.dir, fmt.Sprintf(".job%d", len(s.jobs)))}
	s.jobs = append(s.jobs, j)
	if _, _, err := s.run(fmt.Sprintf("sleep infinity | %s >%s 2>&1 &", command, j.file)); err != nil {
		return err
	}
	if !stays.MatchString(command) || strings.Contains(command, "govmm console") {
		return nil
	}
	return await(func() error {
		out, err := os.ReadFile(j.file)
		if err != nil || !ready.Match(out) {
			return fmt.Errorf("it is not ready (%v), and has printed:\n%s", err, out)
		}
		return nil
	}, func() bool {
		out, err := os.ReadFile(j.file)
		return err == nil && fails.Match(out)
	})
}

// end compares what the commands in the background have printed so far with what the page says.
func (s *shell) end() error {
	for ; s.ended < len(s.jobs); s.ended++ {
		j := s.jobs[s.ended]
		err := await(func() error {
			out, err := os.ReadFile(j.file)
			if err != nil {
				return err
			}
			return s.compare(j.step.output, string(out))
		}, func() bool { return false })
		if err != nil {
			return fmt.Errorf("line %d: $ %s\n%w", j.step.line, j.step.command, err)
		}
	}
	return nil
}

// await tries f until it succeeds, or cannot any more.
func await(f func() error, never func() bool) error {
	for deadline := time.Now().Add(testenv.Patience); ; time.Sleep(20 * time.Millisecond) {
		if err := f(); err == nil || never() || time.Now().After(deadline) {
			return err
		}
	}
}

var (
	figures = regexp.MustCompile(`\S*\d\S*`)
	blanks  = regexp.MustCompile(`\s+`)
)

// compare looks for the lines of a page in what was printed: those that begin with govmm:, with
// any figures, and those without figures. A page calls the home directory /home/me, or leaves
// it out.
func (s *shell) compare(want []string, printed string) error {
	printed = strings.ReplaceAll(printed, s.dir+"/", "")
	lines := strings.Split(printed, "\n")
	for i := range lines {
		lines[i] = shape(lines[i])
	}
	for _, w := range want {
		if strings.Contains(w, "...") || strings.Contains(w, "…") || strings.TrimSpace(w) == "" {
			continue
		}
		if !strings.HasPrefix(w, "govmm: ") && (figures.MatchString(w) || strings.HasPrefix(w, "<")) {
			continue
		}
		found := false
		for _, l := range lines {
			found = found || l == shape(strings.ReplaceAll(w, "/home/me/", ""))
		}
		if !found {
			return fmt.Errorf("the page says %q, and it has printed:\n%s", w, printed)
		}
	}
	return nil
}

// shape is a line without its figures.
func shape(s string) string {
	return strings.TrimSpace(blanks.ReplaceAllString(figures.ReplaceAllString(strings.TrimRight(s, "\r"), "#"), " "))
}
