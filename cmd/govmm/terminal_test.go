package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/internal/vmtest"
	"golang.org/x/sys/unix"
)

// terminal is a pseudo-terminal with a govmm on it.
type terminal struct {
	t      *testing.T
	master *os.File
	before unix.Termios
	cmd    *exec.Cmd

	mu     sync.Mutex // guards screen, more
	screen bytes.Buffer
	more   chan struct{} // closed when something is printed
}

// open starts govmm on a new terminal, as its session's leader.
func (c *cli) open(args ...string) *terminal {
	c.t.Helper()
	return c.openCommand(c.command(c.t.Context(), args...))
}

// openCommand starts any command so.
func (c *cli) openCommand(cmd *exec.Cmd) *terminal {
	c.t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = master.Close() })
	tm := &terminal{t: c.t, master: master, more: make(chan struct{})}
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		c.t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		c.t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		c.t.Fatal(err)
	}
	defer func() { _ = slave.Close() }()
	tm.before = tm.termios()
	tm.cmd = cmd
	cmd.Env = c.environ()
	tm.cmd.Stdin, tm.cmd.Stdout, tm.cmd.Stderr = slave, slave, slave
	tm.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := tm.cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	go tm.read()
	return tm
}

func (tm *terminal) read() {
	buf := make([]byte, 4096)
	for {
		n, err := tm.master.Read(buf)
		tm.mu.Lock()
		tm.screen.Write(buf[:n])
		close(tm.more)
		tm.more = make(chan struct{})
		tm.mu.Unlock()
		if err != nil {
			return // EIO: nobody has the terminal open any more
		}
	}
}

// termios asks for the terminal's modes; master and slave share them.
func (tm *terminal) termios() unix.Termios {
	tm.t.Helper()
	got, err := unix.IoctlGetTermios(int(tm.master.Fd()), unix.TCGETS)
	if err != nil {
		tm.t.Fatal(err)
	}
	return *got
}

// await waits until text has been printed.
func (tm *terminal) await(text string) {
	tm.t.Helper()
	limit := time.After(30 * time.Second)
	for {
		tm.mu.Lock()
		screen, more := tm.screen.String(), tm.more
		tm.mu.Unlock()
		if strings.Contains(screen, text) {
			return
		}
		select {
		case <-more:
		case <-limit:
			_ = tm.cmd.Process.Kill()
			tm.t.Fatalf("no %q in\n%s", text, screen)
		}
	}
}

func (tm *terminal) write(s string) {
	tm.t.Helper()
	if _, err := tm.master.WriteString(s); err != nil {
		tm.t.Fatal(err)
	}
}

// ended waits for the process and checks that the terminal is as it was.
func (tm *terminal) ended(exit int) {
	tm.t.Helper()
	kill := time.AfterFunc(30*time.Second, func() { _ = tm.cmd.Process.Kill() })
	defer kill.Stop()
	_ = tm.cmd.Wait()
	if got := tm.cmd.ProcessState.ExitCode(); got != exit {
		tm.t.Errorf("exit %v, want %d", tm.cmd.ProcessState, exit)
	}
	if tm.termios() != tm.before {
		tm.t.Error("the terminal is not as it was")
	}
}

// A terminal is raw while the guest has it, and as it was on every way out.
func TestTerminal(t *testing.T) {
	testenv.NeedKVM(t)
	for _, tc := range []struct {
		name string
		end  func(*cli, *terminal)
		exit int
		last string
	}{
		{"keys", func(_ *cli, tm *terminal) { tm.write("\x01x") }, exitDone, "stopped"},
		{"poweroff", func(_ *cli, tm *terminal) { tm.write("poweroff\r") }, exitDone, "powered off"},
		{"SIGTERM", func(_ *cli, tm *terminal) { _ = tm.cmd.Process.Signal(syscall.SIGTERM) }, exitDone, "stopped"},
		{"SIGINT", func(_ *cli, tm *terminal) { _ = tm.cmd.Process.Signal(syscall.SIGINT) }, exitDone, "stopped"},
		{"stop", func(c *cli, _ *terminal) { c.run("stop", "--force") }, exitDone, "stopped"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newCLI(t)
			tm := c.open("run", "--memory", "32M", "--cmdline", "fill=1M tick=1")
			tm.await("tick 1 ")
			if now := tm.termios(); now.Lflag&(unix.ICANON|unix.ECHO|unix.ISIG) != 0 {
				t.Error("the terminal is not raw")
			}
			tm.write("\x01h")
			tm.await("Ctrl-A x")
			tm.write("help\r")
			tm.await("poweroff, reboot")
			tc.end(c, tm)
			tm.ended(tc.exit)
			tm.await(tc.last)
			tm.mu.Lock()
			defer tm.mu.Unlock()
			if s := tm.screen.String(); strings.Contains(strings.ReplaceAll(s, "\r\n", ""), "\n") {
				t.Errorf("a line feed without a carriage return: %q", s)
			}
		})
	}
}

// However the process ends, the terminal is as it was: after SIGKILL in a moment, since
// another process does it, and otherwise when the process has ended.
func TestTerminalWhateverHappens(t *testing.T) {
	testenv.NeedKVM(t)
	for _, tc := range []struct {
		name   string
		signal syscall.Signal
		exit   int
		says   string
	}{
		{"SIGQUIT", syscall.SIGQUIT, 2, "SIGQUIT: quit"},
		{"SIGABRT", syscall.SIGABRT, 2, "SIGABRT: abort"},
		{"panic in a goroutine", syscall.SIGUSR1, 2, "panic: on purpose"},
		{"SIGKILL", syscall.SIGKILL, -1, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newCLI(t)
			tm := c.open("run", "--memory", "32M", "--cmdline", "fill=1M tick=1")
			tm.await("tick 1 ")
			tm.awaitRaw(true)
			_ = tm.cmd.Process.Signal(tc.signal)
			if tc.signal == syscall.SIGKILL {
				_ = tm.cmd.Wait()
				tm.awaitRaw(false)
			}
			tm.ended(tc.exit)
			tm.await(tc.says)
			for deadline := vmtest.Within(t); len(watchers(t, c)) > 0; time.Sleep(time.Millisecond) {
				if deadline.Err() != nil {
					t.Fatal("the process that watches the terminal is still there")
				}
			}
		})
	}
}

// awaitRaw waits until the terminal is raw, or as it was.
func (tm *terminal) awaitRaw(raw bool) {
	tm.t.Helper()
	for deadline := vmtest.Within(tm.t); ; time.Sleep(time.Millisecond) {
		now := tm.termios()
		if raw && now.Lflag&(unix.ICANON|unix.ECHO|unix.ISIG) == 0 || !raw && now == tm.before {
			return
		}
		if deadline.Err() != nil {
			_ = tm.cmd.Process.Kill()
			tm.t.Fatalf("the terminal does not become raw: %v", raw)
		}
	}
}

// watchers lists the processes that watch a terminal of c's.
func watchers(t *testing.T, c *cli) (pids []string) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		line, _ := os.ReadFile(p + "/cmdline")
		env, _ := os.ReadFile(p + "/environ")
		if bytes.Contains(line, []byte(watchTerminal)) && bytes.Contains(env, []byte("XDG_RUNTIME_DIR="+c.dir+"\x00")) {
			pids = append(pids, p)
		}
	}
	return pids
}

// A process that is stopped gives the terminal back, and takes it again when it goes on.
func TestTerminalStopAndContinue(t *testing.T) {
	testenv.NeedKVM(t)
	c := newCLI(t)
	tm := c.open("run", "--memory", "32M", "--cmdline", "fill=1M tick=1")
	tm.await("tick 1 ")
	for range 3 {
		tm.awaitRaw(true)
		_ = tm.cmd.Process.Signal(syscall.SIGTSTP)
		tm.awaitRaw(false)
		var status unix.WaitStatus
		if _, err := unix.Wait4(tm.cmd.Process.Pid, &status, unix.WUNTRACED, nil); err != nil || !status.Stopped() {
			t.Fatalf("%v, %v", status, err)
		}
		_ = tm.cmd.Process.Signal(syscall.SIGCONT)
	}
	tm.awaitRaw(true)
	tm.write("help\r")
	tm.await("poweroff, reboot")
	tm.write("\x01x")
	tm.ended(exitDone)
}

// Started in the background the guest runs, and the terminal is the shell's; brought to
// the front, it gets the keys.
func TestTerminalFromTheBackground(t *testing.T) {
	testenv.NeedKVM(t)
	c := newCLI(t)
	script := `set -m; "$0" run --memory 32M --cmdline "fill=1M tick=1" & read line; echo "the shell read $line"; fg; read line; echo "then $line"`
	tm := c.openCommand(exec.CommandContext(t.Context(), "/bin/sh", "-c", script, os.Args[0]))
	tm.await("tick 2 ") // it is not stopped
	if tm.termios() != tm.before {
		t.Error("a background job changed the terminal")
	}
	tm.write("word\r")
	tm.await("the shell read word")
	tm.awaitRaw(true)
	tm.write("help\r")
	tm.await("poweroff, reboot")
	tm.write("\x01x")
	tm.await("stopped")
	tm.awaitRaw(false)
	tm.write("end\r")
	tm.await("then end")
	tm.ended(exitDone)
}

// A crash leaves the terminal as it was, too.
func TestTerminalAfterACrash(t *testing.T) {
	testenv.NeedKVM(t)
	c := newCLI(t)
	kernel := filepath.Join(c.dir, "kernel")
	jump := []byte{0xb8, 0x00, 0x00, 0x00, 0xd0, 0xff, 0xe0} // mov $0xd0000000,%eax; jmp *%eax
	if err := os.WriteFile(kernel, vmtest.Kernel(jump), 0o600); err != nil {
		t.Fatal(err)
	}
	tm := c.open("run", "--memory", "32M", "--kernel", kernel)
	tm.ended(exitFailed)
	tm.await("the guest crashed")
}

// The demo passes, draws to its end, and leaves nothing behind.
func TestDemo(t *testing.T) {
	testenv.NeedKVM(t)
	c := newCLI(t)
	for _, args := range [][]string{{"demo"}, {"demo", "--tls"}} {
		exit, stdout, stderr := c.run(args...)
		if exit != exitDone || !strings.HasSuffix(stdout, "\nbad=0\n") || stderr != "" {
			t.Errorf("%v: exit %d, %q\n%s", args, exit, stderr, stdout)
		}
		for _, want := range []string{"source      | tick ", "destination | tick ", "ROUND", "completed: "} {
			if !strings.Contains(stdout, want) {
				t.Errorf("%v: no %q in\n%s", args, want, stdout)
			}
		}
	}
}

// Interrupted, the demo ends its children, and their sockets are gone.
func TestDemoInterrupted(t *testing.T) {
	testenv.NeedKVM(t)
	c := newCLI(t)
	tmp := t.TempDir()
	cmd := c.command(t.Context(), "demo")
	cmd.Env = append(cmd.Env, "TMPDIR="+tmp)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var seen bytes.Buffer
	buf := make([]byte, 4096)
	for !strings.Contains(seen.String(), "source      | owns ") {
		n, err := stdout.Read(buf)
		if err != nil {
			t.Fatalf("%v after %s", err, &seen)
		}
		seen.Write(buf[:n])
	}
	children := childrenOf(t, cmd.Process.Pid)
	if len(children) != 2 {
		t.Errorf("%d children, want 2", len(children))
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if cmd.ProcessState.ExitCode() != exitFailed {
		t.Errorf("%v", cmd.ProcessState)
	}
	oneLine(t, stderr.String(), "interrupted")
	for _, pid := range children {
		if err := syscall.Kill(pid, 0); err != syscall.ESRCH {
			t.Errorf("child %d is still there: %v", pid, err)
		}
	}
	if left, err := os.ReadDir(tmp); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// childrenOf lists the processes that a process has started
// (proc_pid_task_children(5)).
func childrenOf(t *testing.T, pid int) (pids []int) {
	t.Helper()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range strings.Fields(string(data)) {
			var child int
			if _, err := fmt.Sscan(w, &child); err != nil {
				t.Fatal(err)
			}
			pids = append(pids, child)
		}
	}
	return pids
}
