package test

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pty is a terminal whose session a process leads.
type pty struct {
	t      *testing.T
	master *os.File
	screen *lines
}

// onTerminal starts govmm as the leader of a new terminal's session.
func (h *host) onTerminal(t *testing.T, args ...string) (*pty, chan int, int) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	cmd := h.command(args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &pty{t, master, newLines()}
	go p.screen.from(master)
	exit := make(chan int, 1)
	go func() {
		_ = cmd.Wait()
		exit <- cmd.ProcessState.ExitCode()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		if t.Failed() {
			t.Logf("the screen:\n%s", p.screen.tail(40))
		}
	})
	return p, exit, cmd.Process.Pid
}

func (p *pty) raw() bool {
	p.t.Helper()
	m, err := unix.IoctlGetTermios(int(p.master.Fd()), unix.TCGETS)
	if err != nil {
		p.t.Fatal(err)
	}
	return m.Lflag&(unix.ICANON|unix.ECHO) == 0
}

func (p *pty) awaitRaw(want bool) {
	p.t.Helper()
	for limit := time.Now().Add(patience); p.raw() != want; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(limit) {
			p.t.Fatalf("the terminal is raw: %v, expected %v", !want, want)
		}
	}
}

func (p *pty) write(s string) {
	p.t.Helper()
	if _, err := p.master.WriteString(s); err != nil {
		p.t.Fatal(err)
	}
}

// TestUpgradeTerminal: the terminal stays with the process that was started on it: it is raw,
// its keys reach the guest and what the guest prints it, after two upgrades as before; the
// keys for govmm work; it is restored at the end, however that comes.
func TestUpgradeTerminal(t *testing.T) {
	needKVM(t)
	for name, c := range map[string]struct {
		end  func(h *host, p *pty, attendant, pid int)
		exit int
		says string
	}{
		"Ctrl-A x":                  {func(_ *host, p *pty, _, _ int) { p.write("\x01x") }, 0, "stopped"},
		"poweroff":                  {func(_ *host, p *pty, _, _ int) { p.write("poweroff\r") }, 0, "powered off"},
		"the guest's process dies":  {func(_ *host, _ *pty, _, pid int) { _ = syscall.Kill(pid, syscall.SIGKILL) }, 1, "without a word"},
		"the other process is shot": {func(_ *host, _ *pty, attendant, _ int) { _ = syscall.Kill(attendant, syscall.SIGKILL) }, -1, ""},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			p, exit, attendant := h.onTerminal(t, "run", "a", "--memory", "64M", "--memory-backing", "memfd", "--cmdline", "fill=4M tick=0.5")
			p.screen.awaitText(t, 0, "filled ")
			p.awaitRaw(true)
			pid := 0
			for i := range 2 {
				from := p.screen.len()
				pid = h.mustUpgrade("a").PID
				p.screen.awaitText(t, from, "goes on in process")
				p.screen.awaitTick(t, from+1, fmt.Sprintf("after upgrade %d", i), func(tick) bool { return true })
				p.awaitRaw(true)
				from = p.screen.len()
				p.write("help\r")
				p.screen.awaitText(t, from, "poweroff, reboot")
			}
			from := p.screen.len()
			p.write("\x01h")
			p.screen.awaitText(t, from, "Ctrl-A x")
			if s := strings.Join(p.screen.snapshot(), "\n"); strings.Count(s, "filled ") != 1 {
				t.Error("something was printed twice")
			}
			c.end(h, p, attendant, pid)
			select {
			case got := <-exit:
				if got != c.exit {
					t.Errorf("exit %d, expected %d", got, c.exit)
				}
			case <-time.After(patience):
				t.Fatal("it does not end")
			}
			p.awaitRaw(false)
			if c.says != "" {
				p.screen.awaitText(t, 0, c.says)
			}
			for limit := time.Now().Add(patience); syscall.Kill(pid, 0) == nil; time.Sleep(5 * time.Millisecond) {
				if time.Now().After(limit) {
					t.Fatalf("process %d does not end", pid)
				}
			}
		})
	}
}
