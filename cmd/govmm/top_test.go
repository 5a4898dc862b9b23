package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/vmm"
	"golang.org/x/sys/unix"
)

// fakes serves two VMs, and a socket at which nobody answers.
func fakes(t *testing.T) (c *cli, db, web *fakeVM) {
	c = newCLI(t)
	c.env = append(c.env, "TERM=xterm")
	db, web = &fakeVM{}, &fakeVM{}
	c.serve("db", db)
	c.serve("web", web)
	ln, err := net.Listen("unix", filepath.Join(c.dir, "govmm", "hangs.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return c, db, web
}

// On a pipe tables are printed, one an interval, and a VM that does not answer keeps none waiting.
func TestTopOnAPipe(t *testing.T) {
	c, _, _ := fakes(t)
	exit, stdout, stderr := c.run("top", "--interval", "500ms", "--count", "2", "--reverse")
	if exit != exitDone || stderr != "" {
		t.Fatalf("exit %d, %q", exit, stderr)
	}
	tables := strings.Split(strings.TrimSpace(stdout), "\n\n")
	if len(tables) != 2 {
		t.Fatalf("%d tables in\n%s", len(tables), stdout)
	}
	for _, one := range tables {
		lines := strings.Split(one, "\n")
		if len(lines) != 5 || !strings.HasSuffix(lines[0], ", 3 VMs") || !strings.HasPrefix(lines[1], "NAME") ||
			!strings.HasPrefix(lines[2], "web ") || !strings.Contains(lines[2], "running") || !strings.HasPrefix(lines[3], "hangs  no answer") || !strings.HasPrefix(lines[4], "db ") {
			t.Errorf("a table:\n%s", one)
		}
	}
	if exit, stdout, _ = c.run("top", "--interval", "500ms", "--count", "2", "--json"); exit != exitDone || strings.Count(stdout, "\n") != 2 {
		t.Fatalf("exit %d, %q", exit, stdout)
	}
	var r topReading
	if err := json.Unmarshal([]byte(strings.Split(stdout, "\n")[1]), &r); err != nil {
		t.Fatal(err)
	}
	if len(r.VMs) != 3 || r.IntervalMS != 500 || r.VMs[0].Name != "db" || r.VMs[0].Memory != 512<<20 || r.VMs[1].State != stateSilent || r.VMs[0].DiskReadPerSecond == nil {
		t.Errorf("%+v", r)
	}
}

func TestPSWatch(t *testing.T) {
	c, _, _ := fakes(t)
	exit, stdout, stderr := c.run("ps", "--watch", "--interval", "100ms", "--count", "2")
	if exit != exitDone || stderr != "" || strings.Count(stdout, "NAME") != 2 || strings.Count(stdout, "hangs  no answer") != 2 || strings.Count(stdout, "web    running") != 2 {
		t.Errorf("exit %d, %q\n%s", exit, stderr, stdout)
	}
	exit, stdout, _ = c.run("ps", "web", "--watch", "--count", "1", "--json")
	if exit != exitDone || !strings.HasPrefix(stdout, `[{"name":"web"`) || strings.Count(stdout, "\n") != 1 {
		t.Errorf("exit %d, %s", exit, stdout)
	}
	if exit, _, stderr = c.run("ps", "other", "--watch", "--count", "1"); exit != exitFailed {
		t.Errorf("exit %d, %s", exit, stderr)
	}
	tm := c.open("ps", "--watch")
	tm.resize(80, 24)
	tm.await("web    running")
	tm.awaitRaw(true)
	tm.write("q")
	tm.ended(exitDone)
	tm.left()
}

func TestTopUsage(t *testing.T) {
	c := newCLI(t)
	for _, tc := range []struct{ args, words string }{
		{"top a", "expected no argument"},
		{"top --interval 1ms", "--interval"},
		{"top --count -1", "--count"},
		{"top --sort colour", "--sort"},
		{"ps --count 1", "--watch"},
		{"ps --interval 1s", "--watch"},
		{"ps --watch --interval 0s", "--interval"},
	} {
		if exit, _, stderr := c.run(strings.Fields(tc.args)...); exit != exitUsage || !strings.Contains(stderr, tc.words) {
			t.Errorf("%s: exit %d, %q", tc.args, exit, stderr)
		}
	}
	if exit, stdout, stderr := c.run("top", "--count", "1", "--interval", "100ms"); exit != exitDone || !strings.Contains(stdout, ", 0 VMs") {
		t.Errorf("no VM: exit %d, %q, %q", exit, stdout, stderr)
	}
}

// resize gives the terminal another size.
func (tm *terminal) resize(width, height uint16) {
	tm.t.Helper()
	if err := unix.IoctlSetWinsize(int(tm.master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: width, Row: height}); err != nil {
		tm.t.Fatal(err)
	}
}

// left checks that the screen is as it was too, as soon as all that was printed is read.
func (tm *terminal) left() {
	tm.t.Helper()
	const enter, leave = "\x1b[?1049h", "\x1b[m\x1b[?7h\x1b[?25h\x1b[?1049l"
	for deadline := vmtest.Within(tm.t); ; time.Sleep(time.Millisecond) {
		tm.mu.Lock()
		s := tm.screen.String()
		tm.mu.Unlock()
		// The first time may be forgotten.
		if in, out := strings.Count(s, enter), strings.Count(s, leave); out > 0 && (in == out || !strings.HasPrefix(s, enter)) && strings.LastIndex(s, leave) > strings.LastIndex(s, enter) {
			return
		}
		if deadline.Err() != nil {
			tm.t.Fatalf("the alternate screen is not left: %q", s[max(len(s)-300, 0):])
		}
	}
}

// forget makes await look only at what is printed from now on.
func (tm *terminal) forget() {
	tm.mu.Lock()
	defer tm.mu.Unlock()
	tm.screen.Reset()
}

// However top ends, the terminal and its screen are as they were.
func TestTopLeavesTheTerminal(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(*terminal)
		exit int
	}{
		{"q", func(tm *terminal) { tm.write("q") }, exitDone},
		{"Ctrl-C", func(tm *terminal) { tm.write("\x03") }, exitDone},
		{"SIGTERM", func(tm *terminal) { _ = tm.cmd.Process.Signal(syscall.SIGTERM) }, exitDone},
		{"SIGINT", func(tm *terminal) { _ = tm.cmd.Process.Signal(syscall.SIGINT) }, exitDone},
		{"SIGHUP", func(tm *terminal) { _ = tm.cmd.Process.Signal(syscall.SIGHUP) }, exitDone},
		{"SIGQUIT", func(tm *terminal) { _ = tm.cmd.Process.Signal(syscall.SIGQUIT) }, 2},
		{"panic in a goroutine", func(tm *terminal) { _ = tm.cmd.Process.Signal(syscall.SIGUSR1) }, 2},
		{"SIGKILL", func(tm *terminal) { _ = tm.cmd.Process.Signal(syscall.SIGKILL); _ = tm.cmd.Wait(); tm.awaitRaw(false) }, -1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, _, _ := fakes(t)
			tm := c.open("top")
			tm.resize(100, 20)
			tm.await("web")
			tm.awaitRaw(true)
			tc.end(tm)
			tm.ended(tc.exit)
			tm.left()
		})
	}
}

// Stopped, it gives the terminal back; going on it draws everything anew.
func TestTopStopAndContinue(t *testing.T) {
	c, _, _ := fakes(t)
	tm := c.open("top")
	tm.resize(100, 20)
	tm.await("web")
	for _, stop := range []func(){func() { _ = tm.cmd.Process.Signal(syscall.SIGTSTP) }, func() { tm.write("\x1a") }} {
		tm.awaitRaw(true)
		stop()
		tm.awaitRaw(false)
		var status unix.WaitStatus
		if _, err := unix.Wait4(tm.cmd.Process.Pid, &status, unix.WUNTRACED, nil); err != nil || !status.Stopped() {
			t.Fatalf("%v, %v", status, err)
		}
		tm.left()
		tm.forget()
		_ = tm.cmd.Process.Signal(syscall.SIGCONT)
		tm.await("web ")
	}
	tm.awaitRaw(true)
	tm.write("q")
	tm.ended(exitDone)
	tm.left()
}

// The keys do what the help says, also while a VM does not answer.
func TestTopKeys(t *testing.T) {
	c, db, web := fakes(t)
	tm := c.open("top", "--interval", "100ms")
	tm.resize(120, 20)
	tm.await("web")
	tm.await("no answer")
	state := func(vm *fakeVM, want vmm.State) {
		t.Helper()
		for deadline := vmtest.Within(t); vm.Info().State != want; time.Sleep(time.Millisecond) {
			if deadline.Err() != nil {
				t.Fatalf("it is %s, want %s", vm.Info().State, want)
			}
		}
	}
	tm.write("p")
	tm.await("db is paused")
	state(db, vmm.StatePaused)
	tm.await("1 paused")
	tm.write(" ")
	tm.await("db goes on")
	state(db, vmm.StateRunning)
	tm.write("\x1b[F") // End
	tm.write("p")
	tm.await("web is paused")
	state(web, vmm.StatePaused)
	tm.write("d")
	tm.await("2.0M")
	tm.await("dirty 2.0M/s")

	tm.write("h")
	tm.await("Ctrl-A d comes back")
	tm.forget()
	tm.write("\x1b")
	tm.await("NAMEv")
	tm.write("<") // the columns are a ring
	tm.await("DIRTY/sv")
	tm.write("r")
	tm.await("DIRTY/s^")

	// A prompt takes keys that mean something else otherwise; an address is checked.
	tm.write("mq\x15nowhere\r")
	tm.await("expected HOST:PORT")
	tm.write("mhost:70")
	tm.await("migrate web to host:70_")
	tm.write("\x7f1\r")
	tm.await("web migrates to host:71")
	for deadline := vmtest.Within(t); web.Migration() == nil; time.Sleep(time.Millisecond) {
		if deadline.Err() != nil {
			t.Fatal("no migration")
		}
	}
	if web.mu.Lock(); web.to != "host:71" {
		t.Errorf("to %q", web.to)
	}
	web.mu.Unlock()
	tm.await("round 2")
	tm.write("xn")
	tm.write("x")
	tm.await("cancel the migration of web? (y) _")
	tm.write("y")
	tm.await("web: migration to host:71 cancelled")

	tm.resize(30, 6)
	tm.await("h help  p pause\x1b[m") // all is drawn again, and what has room
	tm.write("\x03")
	tm.ended(exitDone)
	tm.left()
	tm.mu.Lock()
	defer tm.mu.Unlock()
	all := tm.screen.String()
	for _, line := range strings.Split(all[strings.LastIndex(all, "\x1b[2J"):], "\x1b[K") {
		if i := strings.LastIndex(line, "H"); i >= 0 && len(strings.TrimSuffix(line[i+1:], "\x1b[m")) > 30+len("\x1b[7m") {
			t.Errorf("a line that is too long: %q", line)
		}
	}
}

// A console that cannot be opened says so on the screen, which comes back.
func TestTopConsoleThatFails(t *testing.T) {
	c, _, _ := fakes(t)
	tm := c.open("top", "--interval", "100ms")
	tm.resize(160, 20)
	tm.await("2 running")
	tm.awaitRaw(true)
	tm.write("c")
	tm.await("the serial port of db")
	tm.await("db: console") // the words of the command
	tm.awaitRaw(true)
	tm.write("q")
	tm.ended(exitDone)
	tm.left()
}

// In the background it leaves the terminal alone; brought to the front it has it.
func TestTopFromTheBackground(t *testing.T) {
	c, _, _ := fakes(t)
	script := `set -m; "$0" top & read line; echo "the shell read $line"; fg; read line; echo "then $line"`
	cmd := c.command(t.Context())
	cmd.Path, cmd.Args = "/bin/sh", []string{"/bin/sh", "-c", script, os.Args[0]}
	tm := c.openCommand(cmd)
	tm.resize(100, 20)
	tm.write("word\r")
	tm.await("the shell read word")
	tm.await("web")
	tm.awaitRaw(true)
	tm.write("q")
	tm.awaitRaw(false)
	tm.write("end\r")
	tm.await("then end")
	tm.ended(exitDone)
	tm.left()
}

// VMs come and go, and so do their rows.
func TestTopComeAndGo(t *testing.T) {
	c, _, web := fakes(t)
	tm := c.open("top", "--interval", "100ms")
	tm.resize(100, 20)
	tm.await("3 VMs")
	web.onEnd()
	tm.await("2 VMs")
	for i := range 40 {
		c.serve(fmt.Sprintf("late%d", i), &fakeVM{})
	}
	tm.await("42 VMs")
	tm.write("G")
	tm.await("late39 ")
	tm.write("q")
	tm.ended(exitDone)
	tm.left()
}
