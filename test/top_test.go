package test

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// tmux is a terminal that a test looks at.
type tmux struct {
	t      *testing.T
	h      *host
	socket string
}

// inTmux runs a shell command in a terminal of its own.
func (h *host) inTmux(t *testing.T, width, height int, script string) *tmux {
	t.Helper()
	tm := &tmux{t: t, h: h, socket: h.dir + "/tmux"}
	tm.run("-f", "/dev/null", "new-session", "-d", "-x", strconv.Itoa(width), "-y", strconv.Itoa(height), "exec /bin/sh")
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the screen:\n%s", tm.screen())
		}
		tm.run("kill-server")
	})
	tm.run("set-option", "-g", "status", "off")
	tm.run("send-keys", "-l", script+"\n")
	return tm
}

func (tm *tmux) run(args ...string) string {
	tm.t.Helper()
	cmd := exec.Command("tmux", append([]string{"-S", tm.socket}, args...)...)
	cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+tm.h.dir, "XDG_STATE_HOME="+tm.h.dir, "PS1=$ ", "ENV=", "TERM=xterm-256color")
	out, err := cmd.CombinedOutput()
	if err != nil {
		tm.t.Fatalf("tmux %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (tm *tmux) screen() string { return tm.run("capture-pane", "-p") }

// keys presses keys, by tmux's names.
func (tm *tmux) keys(keys ...string) {
	tm.t.Helper()
	tm.run(append([]string{"send-keys"}, keys...)...)
}

// await waits for a screen.
func (tm *tmux) await(what string, ok func(string) bool) string {
	tm.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		s := tm.screen()
		if ok(s) {
			return s
		}
		if time.Now().After(deadline) {
			tm.t.Fatalf("no %s on the screen", what)
		}
	}
}

func (tm *tmux) awaitText(text string) string {
	tm.t.Helper()
	return tm.await(strconv.Quote(text), func(s string) bool { return strings.Contains(s, text) })
}

// awaitRow waits until a line begins with a VM's name and has a text in it.
func (tm *tmux) awaitRow(name, text string) {
	tm.t.Helper()
	tm.await(name+" with "+strconv.Quote(text), func(s string) bool {
		for _, l := range strings.Split(s, "\n") {
			if strings.HasPrefix(l, name+" ") && strings.Contains(l, text) {
				return true
			}
		}
		return false
	})
}

// In a real terminal: VMs with what they use, resized, the keys, a migration with its bar, a
// VM that hangs, and the terminal as it was.
func TestTopInATerminal(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	web := h.start("run", "web", "--memory", "256M", "--serial", "file:"+h.dir+"/web.out", "--cmdline", "fill=100M rate=1000 tick=1")
	db := h.start("run", "db", "--memory", "64M", "--serial", "null", "--cmdline", "fill=1M tick=1")
	for _, p := range []*proc{web, db} {
		p.err.awaitText(t, 0, "runs; its API socket is")
	}

	tm := h.inTmux(t, 120, 12, "stty -g > "+h.dir+"/before; "+govmm+" top; echo status $?; stty -g > "+h.dir+"/after; echo compared")
	tm.awaitText("2 VMs, 2 running")
	tm.awaitRow("web", "256M")
	tm.awaitRow("db", "64M")

	// Narrow and low: no line is wrapped, and what is important is there.
	tm.run("resize-window", "-x", "30", "-y", "5")
	tm.await("narrow screen", func(s string) bool {
		return strings.Count(s, "web ") == 1 && strings.Count(s, "db ") >= 1 && strings.Contains(s, "NAMEv") && !strings.Contains(s, "SENT/s") && !strings.Contains(s, "q quit")
	})
	tm.run("resize-window", "-x", "140", "-y", "14")
	tm.awaitText("e events")

	tm.keys("p") // db is the first one
	tm.awaitRow("db", "paused")
	h.awaitInfo("db", "pause", func(i info) bool { return i.State == "paused" })
	tm.keys("p")
	tm.awaitRow("db", "running")

	tm.keys("G", "d")
	tm.await("dirty rate", func(s string) bool { return strings.Contains(s, "web: pid ") && strings.Contains(s, ", dirty ") })

	// A migration that somebody else has begun.
	_, addr := h.receive("dst")
	tm.awaitRow("dst", "listening on "+addr)
	mig := h.start("migrate", "web", "--to", addr, "--bandwidth-limit", "3M", "--progress", "none")
	tm.awaitRow("web", "% round 0")
	tm.awaitRow("dst", "from 127.0.0.1")
	tm.keys("x")
	tm.awaitText("cancel the migration of web?")
	tm.keys("y")
	if exit := mig.wait(); exit != 6 {
		t.Errorf("a migration that is cancelled: exit %d", exit)
	}
	tm.awaitRow("web", "running")

	// A VM that hangs keeps nobody waiting.
	web.kill(syscall.SIGSTOP)
	tm.awaitRow("web", "no answer")
	tm.awaitRow("db", "running")
	tm.keys("h")
	tm.awaitText("Ctrl-A d comes back")
	tm.keys("q")
	web.kill(syscall.SIGCONT)
	tm.awaitRow("web", "running")

	// The console, and back.
	tm.keys("c")
	tm.await("the guest's lines", func(s string) bool { return strings.Contains(s, "tick ") && !strings.Contains(s, "NAMEv") })
	tm.keys("C-a", "d")
	tm.awaitRow("web", "running")

	tm.keys("m")
	tm.awaitText("migrate web to _")
	tm.keys("-l", addr)
	tm.keys("Enter")
	tm.awaitText("web has moved to " + addr)
	if exit := web.wait(); exit != 0 {
		t.Errorf("web: exit %d", exit)
	}
	tm.awaitRow("dst", "running")
	tm.await("end of web's row", func(s string) bool { return strings.Count(s, "web ") == 1 }) // in the message

	tm.keys("q")
	tm.awaitText("\ncompared\n")
	if s := tm.screen(); !strings.Contains(s, "status 0") || strings.Contains(s, "NAMEv") {
		t.Errorf("the screen afterwards:\n%s", s)
	}
	before, err := os.ReadFile(h.dir + "/before")
	if err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(h.dir + "/after"); err != nil || string(before) != string(after) {
		t.Errorf("the terminal was\n%sand is\n%s, %v", before, after, err)
	}
}
