package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/vmm/sandbox"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// forbidCall makes the host of a govmm forbid a system call, as a container may: its number.
const forbidCall = "GOVMM_TEST_FORBID"

// forbid has the system call fail with EPERM, in all threads.
func forbid(number string) {
	n, err := strconv.ParseUint(number, 10, 32)
	if err != nil {
		panic(err)
	}
	program, err := bpf.Assemble([]bpf.Instruction{bpf.LoadAbsolute{Off: 0, Size: 4}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(n), SkipFalse: 1},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)}, bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW}})
	if err != nil {
		panic(err)
	}
	prog := &struct { // struct sock_fprog
		len    uint16
		filter *bpf.RawInstruction
	}{uint16(len(program)), &program[0]}
	_, _, errno := syscall.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(prog)))
	if errno != 0 {
		panic(errno)
	}
}

// A sandbox that was asked for and that the host does not give is a refusal; by default one
// line says what is missing, and the guest runs.
func TestSandboxThatTheHostForbids(t *testing.T) {
	testenv.NeedKVM(t)
	testenv.NeedRoot(t, "a filter of system calls")
	for call, what := range map[int]string{
		unix.SYS_LANDLOCK_CREATE_RULESET: "Landlock: operation not permitted (files and TCP ports are not restricted)",
		unix.SYS_SECCOMP:                 "seccomp: operation not permitted (system calls are not filtered)",
	} {
		c := newCLI(t)
		c.env = []string{fmt.Sprint(forbidCall, "=", call)}
		for _, command := range [][]string{{"run", "a", "--memory", "32M"}, {"receive", "a", "--listen", "127.0.0.1:0"}} {
			exit, stdout, stderr := c.run(append(command, "--serial", "null", "--sandbox", "on")...)
			if want := "govmm: " + command[0] + " a: enter the sandbox: the host does not give it: " + what + "; --sandbox auto goes on without\n"; exit != exitFailed || stdout != "" || stderr != want {
				t.Errorf("exit %d, %q, %q, want %q", exit, stdout, stderr, want)
			}
		}
		tm := c.open("run", "a", "--memory", "32M", "--cmdline", "fill=1M tick=1")
		tm.await("tick 1 ")
		if _, stdout, _ := c.run("info", "a"); !strings.Contains(stdout, "sandbox     on, ") || !strings.Contains(stdout, "missing: "+what) {
			t.Error(stdout)
		}
		tm.await("govmm: the sandbox lacks what this host does not give: " + what)
		c.run("stop", "a", "--force")
		tm.ended(exitDone)
		tm.mu.Lock()
		screen := tm.screen.String()
		tm.mu.Unlock()
		if n := strings.Count(screen, "the sandbox lacks"); n > 1 {
			t.Errorf("%d warnings: %q", n, screen)
		}
	}
}

// A new process lacks nothing of the sandbox that the one before has, unless it is told to.
func TestSandboxAfterAnUpgrade(t *testing.T) {
	whole, part := sandbox.Status{Mode: sandbox.On, Landlock: 1, Seccomp: true}, sandbox.Status{Mode: sandbox.On, Seccomp: true}
	for _, tc := range []struct {
		flag   string
		before sandbox.Status
		want   sandbox.Mode
	}{{"auto", whole, sandbox.On}, {"auto", part, sandbox.Auto}, {"on", part, sandbox.On}, {"off", whole, sandbox.Off}} {
		if got := heirSandbox(tc.flag, tc.before); got != string(tc.want) {
			t.Errorf("%s after %v: %s", tc.flag, tc.before, got)
		}
	}
}

// forbidden applies forbidCall.
func forbidden() {
	if number := os.Getenv(forbidCall); number != "" {
		forbid(number)
	}
}
