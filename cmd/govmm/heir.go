package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/govmm/govmm/internal/unixsock"
	"github.com/govmm/govmm/vmm/api"
	"golang.org/x/sys/unix"
)

// checkTime bounds how long a binary may take to say what it is.
const checkTime = 10 * time.Second

// checkBinary asks a binary whether it can take guests over, and returns its version.
func checkBinary(ctx context.Context, path string) (version string, err error) {
	fail := func(format string, a ...any) (string, error) {
		return "", fmt.Errorf("--binary %s: %s; the guest goes on where it is", path, fmt.Sprintf(format, a...))
	}
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, takeOver, takeOverCheck)
	cmd.WaitDelay = time.Second
	said := &firstBytes{enough: cancel}
	cmd.Stdout = said
	err = cmd.Run()
	text := said.String()
	name, rest, _ := strings.Cut(strings.TrimSuffix(text, "\n"), " ")
	protocol, version, _ := strings.Cut(rest, " ")
	exit := (*exec.ExitError)(nil)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fail("there is no such program")
	case errors.Is(err, fs.ErrPermission):
		return fail("it is no program that may be started here")
	case errors.Is(err, unix.ENOEXEC):
		return fail("it is no program of this processor")
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fail("it does not say within %v what it is", checkTime)
	case err != nil && !errors.As(err, &exit) && !said.full():
		return fail("%v", err)
	case name != "govmm-take-over" || strings.Contains(text[:max(len(text)-1, 0)], "\n") || err != nil:
		return fail("it is no govmm, or one that cannot take guests over (it printed %.60q)", text)
	case protocol != strconv.Itoa(takeOverProtocol):
		return fail("it speaks version %.20q of the take-over protocol, expected %d", protocol, takeOverProtocol)
	}
	return version, nil
}

// firstBytes keeps the first bytes that are written, and then calls enough.
type firstBytes struct {
	mu     sync.Mutex // guards kept
	kept   bytes.Buffer
	enough func() // nil: the rest is thrown away
}

const mostKept = 4096

// Write implements [io.Writer].
func (b *firstBytes) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.kept.Write(p[:min(len(p), mostKept-b.kept.Len())])
	if b.kept.Len() == mostKept && b.enough != nil {
		b.enough()
		return 0, errors.New("that is too much")
	}
	return len(p), nil
}

func (b *firstBytes) full() bool { return len(b.String()) == mostKept }

func (b *firstBytes) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.kept.String()
}

// heirProcess is the new process, as the command that has started it sees it.
type heirProcess struct {
	pid   int
	said  *firstBytes
	ended chan struct{}
}

// startHeir starts the process that takes over the guest of the VM at socket: as the VM's
// user, in its network namespace and control groups, with its limits.
func startHeir(binary, socket, sandboxMode string, conn *net.UnixConn, old int, warn func(string, ...any)) (*heirProcess, error) {
	peer, err := unixsock.Peer(conn)
	if err != nil {
		return nil, err
	}
	record, err := api.OpenRecord(socket, int(peer.Uid))
	if err != nil {
		return nil, err
	}
	defer record.Close()
	f, err := conn.File()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	socket, err = filepath.Abs(socket)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(binary, takeOver, socket, sandboxMode)
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{f, record}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if os.Geteuid() == 0 && peer.Uid != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: peer.Uid, Gid: peer.Gid}
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stderr = w
	// What this command was started with beside its stdio is nothing for a process that stays.
	_ = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	sibling := os.Getenv("MAINPID") == strconv.Itoa(old) // what systemd runs for a unit (ExecReload=) has all that its main process has
	if sibling {
		err = cmd.Start()
	} else {
		err = inNetworkOf(old, cmd.Start)
	}
	_ = w.Close()
	if err != nil {
		_ = r.Close()
		return nil, err
	}
	h := &heirProcess{pid: cmd.Process.Pid, said: new(firstBytes), ended: make(chan struct{})}
	go func() {
		_, _ = io.Copy(h.said, r) // until it has the stderr of the VM's process
		_ = r.Close()
	}()
	go func() {
		_ = cmd.Wait()
		close(h.ended)
	}()
	if sibling {
		return h, nil
	}
	limitsOf(old, h.pid)
	if err := groupsOf(old, h.pid); err != nil {
		warn("the new process stays in the control group of this command: %v", err)
	}
	return h, nil
}

func (h *heirProcess) hasEnded() bool {
	select {
	case <-h.ended:
		return true
	default:
		return false
	}
}

// end returns what the process has printed, when it has ended. One that does not end within
// a moment is killed: the guest has gone on in the old one.
func (h *heirProcess) end() string {
	select {
	case <-h.ended:
	case <-time.After(time.Second):
		_ = syscall.Kill(h.pid, syscall.SIGKILL) // it is a child that was not waited for
		<-h.ended
	}
	line, _, _ := strings.Cut(strings.TrimSpace(h.said.String()), "\n")
	return strings.ToValidUTF8(fmt.Sprintf("%.200s", line), "?")
}

// inNetworkOf calls start in the network namespace of a process, if that can be looked at
// and is another one.
func inNetworkOf(pid int, start func() error) error {
	path := fmt.Sprintf("/proc/%d/ns/net", pid)
	theirs, err1 := os.Readlink(path)
	mine, err2 := os.Readlink("/proc/self/ns/net")
	if err1 != nil || err2 != nil || theirs == mine {
		return start()
	}
	ns, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("its network namespace: %w", err)
	}
	defer ns.Close()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with the goroutine
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter its network namespace: %w", err)
			return
		}
		done <- start()
	}()
	return <-done
}

// limitsOf gives a process the limits of another, as far as this one may.
func limitsOf(from, to int) {
	for _, what := range []int{unix.RLIMIT_NOFILE, unix.RLIMIT_MEMLOCK, unix.RLIMIT_AS} {
		var l unix.Rlimit
		if unix.Prlimit(from, what, nil, &l) == nil {
			_ = unix.Prlimit(to, what, &l, nil) // what is too low for the VM its start says
		}
	}
}

// groupsOf puts a process into the control groups of another one.
func groupsOf(from, to int) error {
	groups := func(pid int) (string, error) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		return string(text), err
	}
	theirs, err := groups(from)
	if err != nil {
		return err
	}
	ours, err := groups(to)
	if err != nil || ours == theirs {
		return nil // it has ended, or there is nothing to do
	}
	var errs []error
	for line := range strings.Lines(theirs) {
		if strings.Contains(ours, line) {
			continue
		}
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3) // cgroups(7)
		if len(fields) != 3 {
			continue
		}
		procs := filepath.Join("/sys/fs/cgroup", strings.TrimPrefix(fields[1], "name="), fields[2], "cgroup.procs")
		if err := os.WriteFile(procs, []byte(strconv.Itoa(to)), 0); !errors.Is(err, unix.ESRCH) { // it has ended
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
