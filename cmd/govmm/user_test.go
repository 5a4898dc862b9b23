package main

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/internal/vmtest"
)

func TestParseUser(t *testing.T) {
	if os.Geteuid() != 0 {
		if _, err := parseUser("1"); err == nil || !strings.Contains(err.Error(), "only root") {
			t.Errorf("told: %v", err)
		}
		t.Skip("the rest is for root")
	}
	for s, want := range map[string]identity{"65534:7": {65534, 7}, "4000000000": {4000000000, 4000000000}, "12345678:0": {12345678, 0}} {
		if id, err := parseUser(s); err != nil || *id != want {
			t.Errorf("%q: %v, %v", s, id, err)
		}
	}
	if id, err := parseUser(""); id != nil || err != nil {
		t.Errorf("nobody: %v, %v", id, err)
	}
	for _, s := range []string{"0", "root", "0:1", "-1", "4294967295", "4294967296", "1:-1", "1:4294967295", ":", ":1", "1:", "1:2:3", "no such user", "1:no such group"} {
		if id, err := parseUser(s); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, %v", s, id, err)
		}
	}
}

// unprivileged is a VM of TestUser.
type unprivileged struct {
	c          *cli
	cmd        *exec.Cmd
	out        bytes.Buffer // valid when cmd has ended
	api, lines string       // paths of sockets
}

func (u *unprivileged) run(args ...string) string {
	u.c.t.Helper()
	exit, out, stderr := u.c.run(append(args, "--api-socket", u.api)...)
	if exit != exitDone {
		u.c.t.Fatalf("%s: exit status %d: %s", args, exit, stderr)
	}
	return out
}

// startUnprivileged starts a command with --user and waits for the state.
func (c *cli) startUnprivileged(dir, name, state string, args ...string) *unprivileged {
	c.t.Helper()
	u := &unprivileged{c: c, api: filepath.Join(dir, name+".api"), lines: filepath.Join(dir, name+".lines")}
	u.cmd = c.command(c.t.Context(), append(args, name, "--user", "65534:65533", "--api-socket", u.api, "--serial", "unix:"+u.lines,
		"--console", "file:"+filepath.Join(dir, "console"), "--disk", "path="+filepath.Join(dir, "a.img"), "--vsock", "path="+filepath.Join(dir, "vsock"))...)
	u.cmd.Stderr = &u.out
	testenv.Check(c.t, u.cmd.Start())
	deadline := vmtest.Within(c.t)
	for {
		if exit, out, _ := c.run("info", "--api-socket", u.api); exit == exitDone && strings.Contains(out, state) {
			return u
		}
		if deadline.Err() != nil {
			_ = u.cmd.Process.Kill()
			_ = u.cmd.Wait()
			c.t.Fatal(u.out.String())
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// reboots types reboot, and waits for the guest's first words after it.
func (u *unprivileged) reboots() {
	u.c.t.Helper()
	conn, err := net.Dial("unix", u.lines)
	testenv.Check(u.c.t, err)
	defer conn.Close()
	testenv.Check(u.c.t, conn.SetDeadline(time.Now().Add(testenv.Patience)))
	await := func(words string) {
		u.c.t.Helper()
		said, buf := "", make([]byte, 4096)
		for !regexp.MustCompile(words).MatchString(said) {
			n, err := conn.Read(buf)
			if err != nil {
				u.c.t.Fatalf("%v after %.2000q", err, said)
			}
			said += string(buf[:n])
		}
	}
	await(`tick \d`) // a guest that has just started discards what was typed before
	_, err = conn.Write([]byte("reboot\r"))
	testenv.Check(u.c.t, err)
	await(`(?s)reboot.*reboot.*demo guest: 1 vCPU`) // the echo, the answer
}

// TestUser: a VM's process that root has started with --user has no right of root's when its
// guest runs, and the guest resets, moves and ends; nothing that it has made stays.
func TestUser(t *testing.T) {
	testenv.NeedKVM(t)
	if os.Geteuid() != 0 {
		t.Skip("only root can become another user")
	}
	c := newCLI(t)
	dir, err := os.MkdirTemp("", "govmm-user-")
	testenv.Check(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	image := filepath.Join(dir, "a.img")
	testenv.Check(t, os.WriteFile(image, make([]byte, 1<<20), 0o600)) // root's alone
	testenv.Check(t, os.Chown(dir, 65534, 65533))

	a := c.startUnprivileged(dir, "a", "running", "run", "--memory", "32M")
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.cmd.Process.Pid))
	testenv.Check(t, err)
	for _, line := range []string{"Uid:\t65534\t65534\t65534\t65534\n", "Gid:\t65533\t65533\t65533\t65533\n", "Groups:\t \n",
		"CapPrm:\t0000000000000000\n", "CapEff:\t0000000000000000\n"} {
		if !strings.Contains(string(text), line) {
			t.Errorf("no %q in:\n%s", line, text)
		}
	}
	a.reboots()

	receive := []string{"receive", "b", "--listen", "127.0.0.1:0", "--user", "65534:65533", "--serial", "null", "--disk", "path=" + image}
	if exit, _, stderr := c.run(receive...); exit != exitFailed || !strings.Contains(stderr, image+": user 65534, group 65533: permission denied") {
		t.Errorf("a receiver whose user cannot open the disk: exit status %d: %s", exit, stderr)
	}
	testenv.Check(t, os.Chown(image, 65534, 0))
	b := c.startUnprivileged(dir, "b", "address ", "receive", "--listen", "127.0.0.1:0")
	address := regexp.MustCompile(`address +(\S+)`).FindStringSubmatch(b.run("info"))[1]
	a.run("migrate", "--to", address)
	if err := a.cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, a.out.String())
	}
	b.reboots()
	b.run("stop", "--force")
	if err := b.cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, b.out.String())
	}
	left, err := os.ReadDir(dir)
	testenv.Check(t, err)
	if slices.ContainsFunc(left, func(e os.DirEntry) bool { return e.Name() != "a.img" && e.Name() != "console" }) {
		t.Errorf("left behind: %v", left)
	}
}
