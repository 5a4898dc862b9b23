package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// attempt is what a helper process in the cage tries: the test binary, started again.
type attempt struct {
	Try    string
	Policy Policy
	Arg    string
	VCPU   bool // on a thread that is narrowed
	// Forbid are system calls that the host forbids to the process, as a container may.
	Forbid []string
}

const attemptVariable = "GOVMM_SANDBOX_ATTEMPT"

func TestMain(m *testing.M) {
	if text := os.Getenv(attemptVariable); text != "" {
		os.Exit(attemptMain(text))
	}
	os.Exit(m.Run())
}

// attemptMain enters the cage, prints "in", tries, and prints what came of it.
func attemptMain(text string) int {
	var a attempt
	if err := json.Unmarshal([]byte(text), &a); err != nil {
		fmt.Println(err)
		return 2
	}
	f, ok := tries[a.Try]
	if !ok {
		fmt.Println("no such attempt", a.Try)
		return 2
	}
	if a.Forbid != nil {
		var rules []rule
		for _, name := range a.Forbid {
			rules = append(rules, rule{call: name, errno: unix.EPERM})
		}
		program, err := assemble(rules, unix.SECCOMP_RET_ALLOW)
		if err == nil {
			_, err = install(program, unix.SECCOMP_FILTER_FLAG_TSYNC)
		}
		if err != nil {
			fmt.Println(err)
			return 2
		}
	}
	reported := make(chan string, 100)
	a.Policy.Report = func(s string) { reported <- s }
	s, err := a.Policy.Enter()
	if err != nil {
		fmt.Println(err)
		return 2
	}
	fmt.Println("in", s)
	done := make(chan error)
	go func() {
		if a.VCPU {
			runtime.LockOSThread()
			if err := NarrowVCPU(); err != nil {
				done <- err
				return
			}
		}
		done <- f(a.Arg)
	}()
	fmt.Println("result:", errorText(<-done))
	for a.Policy.Mode == Log {
		select {
		case s := <-reported:
			fmt.Println("reported:", s)
		case <-time.After(100 * time.Millisecond):
			return 0
		}
	}
	return 0
}

func errorText(err error) string {
	errno := syscall.Errno(0)
	if errors.As(err, &errno) {
		return unix.ErrnoName(errno)
	}
	return fmt.Sprint(err)
}

func call(n uintptr, args ...uintptr) error {
	var a [6]uintptr
	copy(a[:], args)
	if _, _, errno := syscall.Syscall6(n, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
		return errno
	}
	return nil
}

// tries are what is tried, by name.
var tries = map[string]func(arg string) error{
	"nothing": func(string) error { return nil },
	// A device does this to its connections when the guest resets it.
	"shutdown": func(string) error { return unix.Shutdown(-1, unix.SHUT_RD) },
	"read": func(path string) error {
		f, err := os.Open(path)
		if err == nil {
			err = f.Close()
		}
		return err
	},
	"write": func(path string) error {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err == nil {
			err = f.Close()
		}
		return err
	},
	"create": func(path string) error { return os.WriteFile(path, nil, 0o600) },
	"remove": os.Remove,
	"rename": func(path string) error { return os.Rename(path, path+".1") },
	"unix listen": func(path string) error {
		ln, err := net.Listen("unix", path)
		if err == nil {
			err = ln.Close()
		}
		return err
	},
	"tcp bind": func(string) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	},
	"connect": func(port string) error {
		c, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err == nil {
			err = c.Close()
		}
		return err
	},
	"abstract": func(name string) error {
		c, err := net.Dial("unix", "@"+name)
		if err == nil {
			err = c.Close()
		}
		return err
	},
	"udp": func(string) error {
		c, err := net.Dial("udp", "127.0.0.1:53")
		if err == nil {
			err = c.Close()
		}
		return err
	},
	"mptcp":       func(string) error { return call(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP) },
	"packet":      func(string) error { return call(unix.SYS_SOCKET, unix.AF_PACKET, unix.SOCK_RAW, 0) },
	"raw":         func(string) error { return call(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_UDP) },
	"netlink":     func(string) error { return call(unix.SYS_SOCKET, unix.AF_NETLINK, unix.SOCK_RAW, 0) },
	"fast open":   func(string) error { return call(unix.SYS_SENDTO, 0, 0, 0, unix.MSG_FASTOPEN) },
	"exec":        func(string) error { return syscall.Exec("/bin/true", []string{"true"}, nil) },
	"fork":        func(string) error { return call(unix.SYS_CLONE, uintptr(unix.SIGCHLD)) },
	"clone3":      func(string) error { return call(unix.SYS_CLONE3, 0, 0) },
	"namespace":   func(string) error { return call(unix.SYS_CLONE, unix.CLONE_NEWUSER) },
	"unshare":     func(string) error { return call(unix.SYS_UNSHARE, unix.CLONE_NEWNET) },
	"setns":       func(string) error { return call(unix.SYS_SETNS, 0, 0) },
	"ptrace":      func(string) error { return call(unix.SYS_PTRACE, unix.PTRACE_ATTACH, 1) },
	"vm read":     func(string) error { return call(unix.SYS_PROCESS_VM_READV, 1) },
	"mount":       func(string) error { return unix.Mount("none", "/mnt", "tmpfs", 0, "") },
	"bpf":         func(string) error { return call(unix.SYS_BPF) },
	"keyctl":      func(string) error { return call(unix.SYS_KEYCTL) },
	"io_uring":    func(string) error { return call(unix.SYS_IO_URING_SETUP) },
	"userfaultfd": func(string) error { return call(unix.SYS_USERFAULTFD) },
	"perf":        func(string) error { return call(unix.SYS_PERF_EVENT_OPEN) },
	"kexec":       func(string) error { return call(unix.SYS_KEXEC_LOAD) },
	"by handle":   func(string) error { return call(unix.SYS_OPEN_BY_HANDLE_AT) },
	"setuid":      func(string) error { return call(unix.SYS_SETUID, 0) },
	"drop": func(string) error {
		if err := DropCapabilities(); err != nil {
			return err
		}
		var data [2]unix.CapUserData
		if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0]); err != nil {
			return err
		}
		return fmt.Errorf("%v %v", data, Current().Capabilities)
	},
	"chroot":  func(string) error { return unix.Chroot("/") },
	"unknown": func(string) error { return call(499) },
	"x32":     func(string) error { return call(0x40000000 + unix.SYS_GETPID) },
	"executable": func(string) error {
		return call(unix.SYS_MMAP, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON, ^uintptr(0))
	},
	"mprotect":     func(string) error { return call(unix.SYS_MPROTECT, 0, 4096, unix.PROT_EXEC) },
	"kill another": func(string) error { return call(unix.SYS_KILL, 1, 0) },
	"kill self":    func(string) error { return unix.Kill(os.Getpid(), 0) },
	"own sigsys":   func(string) error { return call(unix.SYS_RT_SIGACTION, uintptr(unix.SIGSYS), 0, 0, 8) },
	"owner of io":  func(string) error { return call(unix.SYS_FCNTL, 0, unix.F_SETOWN, 1) },
	"tiocsti":      func(string) error { return call(unix.SYS_IOCTL, 0, unix.TIOCSTI, 0) },
	"dumpable":     func(string) error { return call(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 1) },
	"limit":        func(string) error { return unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: 1, Max: 1}) },
	"answer": func(string) error { // a listener that does not exist cannot be told to go on
		return call(unix.SYS_IOCTL, 0, notifySend, 0)
	},
	"threads": tryThreads,
	"wait": func(string) error {
		_, err := os.Stdin.Read(make([]byte, 1))
		return err
	},
}

// tryThreads makes Go start threads while a thread is narrow, and then end it. Each of the
// others must be able to open a socket.
func tryThreads(string) error {
	const n = 40
	release := make(chan struct{})
	errs := make(chan error, n)
	for range n {
		go func() {
			<-release
			var p [2]int
			err := unix.Pipe2(p[:], unix.O_CLOEXEC)
			if err == nil { // blocks in a system call, which takes a thread of its own
				time.AfterFunc(50*time.Millisecond, func() { _, _ = unix.Write(p[1], []byte{0}) })
				_, err = unix.Read(p[0], make([]byte, 1))
			}
			if err == nil {
				err = call(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM, 0)
			}
			errs <- err
		}()
	}
	narrowed := make(chan error)
	for range 4 {
		go func() {
			runtime.LockOSThread()
			err := NarrowVCPU()
			for range 200 { // the scheduler starts threads from here, if from anywhere
				runtime.Gosched()
			}
			narrowed <- err
		}()
		if err := <-narrowed; err != nil {
			return err
		}
	}
	close(release)
	for range n {
		if err := <-errs; err != nil {
			return err
		}
	}
	return nil
}

// try runs an attempt and returns what it printed.
func try(t *testing.T, a attempt) (out, stderr string, exit int) {
	t.Helper()
	text, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), attemptVariable+"="+string(text), "GORACE=atexit_sleep_ms=0")
	var o, e strings.Builder
	cmd.Stdout, cmd.Stderr = &o, &e
	_ = cmd.Run() // the exit status says it
	if !strings.HasPrefix(o.String(), "in on, ") && !strings.HasPrefix(o.String(), "in log, ") {
		t.Fatalf("%s: not in the cage: %q %q", a.Try, o.String(), e.String())
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}

// ends checks that the attempt ends the process with one line.
func ends(t *testing.T, a attempt, call string) {
	t.Helper()
	out, stderr, exit := try(t, a)
	want := lineBegin + call + lineEnd
	if stderr != want || exit != 1 || strings.Contains(out, "result:") {
		t.Errorf("%s: exit %d, %q, %q; expected exit 1 and %q", a.Try, exit, out, stderr, want)
	}
}

// gets checks what comes of the attempt.
func gets(t *testing.T, a attempt, want string) {
	t.Helper()
	out, stderr, exit := try(t, a)
	if !strings.HasSuffix(out, "result: "+want+"\n") || stderr != "" || exit != 0 {
		t.Errorf("%s %s: exit %d, %q, %q; expected the result %s", a.Try, a.Arg, exit, out, stderr, want)
	}
}

func TestSystemCallsEndTheProcess(t *testing.T) {
	for _, tc := range []struct{ try, call string }{
		{"exec", "execve"}, {"fork", "clone"}, {"namespace", "clone"}, {"unshare", "unshare"}, {"setns", "setns"},
		{"ptrace", "ptrace"}, {"vm read", "process_vm_readv"}, {"mount", "mount"}, {"bpf", "bpf"}, {"keyctl", "keyctl"},
		{"io_uring", "io_uring_setup"}, {"userfaultfd", "userfaultfd"}, {"perf", "perf_event_open"}, {"kexec", "kexec_load"},
		{"by handle", "open_by_handle_at"}, {"setuid", "setuid"}, {"chroot", "chroot"}, {"executable", "mmap"},
		{"mprotect", "mprotect"}, {"kill another", "kill"}, {"own sigsys", "rt_sigaction"}, {"owner of io", "fcntl"}, {"tiocsti", "ioctl"},
		{"dumpable", "prctl"}, {"limit", "prlimit64"}, {"answer", "ioctl"}, {"mptcp", "socket"}, {"packet", "socket"}, {"netlink", "socket"},
		{"fast open", "sendto"}, {"unix listen", "bind"}, {"unknown", "of an unknown number"}, {"x32", "of an unknown number"},
	} {
		t.Run(tc.try, func(t *testing.T) { ends(t, attempt{Try: tc.try, Policy: Policy{Mode: On}, Arg: "x"}, tc.call) })
	}
	gets(t, attempt{Try: "kill self", Policy: Policy{Mode: On}}, "<nil>")
	gets(t, attempt{Try: "clone3", Policy: Policy{Mode: On}}, "ENOSYS")
	gets(t, attempt{Try: "udp", Policy: Policy{Mode: On}}, "<nil>")
	gets(t, attempt{Try: "netlink", Policy: Policy{Mode: On, Netlink: true}}, "<nil>")
	gets(t, attempt{Try: "raw", Policy: Policy{Mode: On}}, "EPERM") // CAP_NET_RAW
}

func TestVCPUThreadsAreNarrower(t *testing.T) {
	dir := t.TempDir()
	policy := Policy{Mode: On, Read: []string{dir}}
	gets(t, attempt{Try: "read", Policy: policy, Arg: dir}, "<nil>")
	ends(t, attempt{Try: "read", Policy: policy, Arg: dir, VCPU: true}, "openat")
	ends(t, attempt{Try: "udp", Policy: policy, VCPU: true}, "socket")
	ends(t, attempt{Try: "exec", Policy: policy, VCPU: true}, "execve")
	gets(t, attempt{Try: "shutdown", Policy: policy, VCPU: true}, "EBADF")
	gets(t, attempt{Try: "threads", Policy: policy}, "<nil>")
}

// TestDropCapabilities drops what was kept, while a vCPU's thread is there.
// What the host forbids is a reason to end for On, and is left out, and said, for Auto.
func TestEnterWhereForbidden(t *testing.T) {
	for _, tc := range []struct{ forbid, want string }{
		{"landlock_create_ruleset", "Landlock: operation not permitted (files and TCP ports are not restricted)"},
		{"seccomp", "seccomp: operation not permitted (system calls are not filtered)"},
	} {
		a := attempt{Try: "nothing", Forbid: []string{tc.forbid}, Policy: Policy{Mode: On}}
		if out, exit := start(t, a); exit != 2 || out != "enter the sandbox: the host does not give it: "+tc.want+"\n" {
			t.Errorf("on: exit %d, %q", exit, out)
		}
		a.Policy.Mode = Auto
		if out, exit := start(t, a); exit != 0 || !strings.HasPrefix(out, "in on, ") || !strings.Contains(out, "missing: "+tc.want+"\n") || !strings.HasSuffix(out, "result: <nil>\n") {
			t.Errorf("auto: exit %d, %q", exit, out)
		}
	}
	a := attempt{Try: "nothing", Policy: Policy{Mode: Auto}}
	if out, _ := start(t, a); !strings.HasPrefix(out, "in on, Landlock ") || !strings.Contains(out, ", seccomp") {
		t.Errorf("auto where nothing is forbidden: %q", out)
	}
}

// start runs an attempt, and returns what it printed.
func start(t *testing.T, a attempt) (stdout string, exit int) {
	t.Helper()
	text, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), attemptVariable+"="+string(text), "GORACE=atexit_sleep_ms=0")
	out, _ := cmd.Output() // the exit status says it
	return string(out), cmd.ProcessState.ExitCode()
}

func TestDropCapabilities(t *testing.T) {
	if withCgo {
		t.Log("a program with cgo keeps them: TestSandboxDropsCapabilities runs the command without")
		return
	}
	for _, vcpu := range []bool{false, true} {
		gets(t, attempt{Try: "drop", Policy: Policy{Mode: On, Keep: []int{unix.CAP_NET_ADMIN}}, VCPU: vcpu}, "[{0 0 0} {0 0 0}] []")
	}
}

// TestLogGoesOn: what would end the process is reported.
func TestLogGoesOn(t *testing.T) {
	out, stderr, exit := try(t, attempt{Try: "unshare", Policy: Policy{Mode: Log}})
	if exit != 0 || stderr != "" || !strings.Contains(out, "result: ") || !strings.Contains(out, "\nreported: unshare\n") {
		t.Errorf("exit %d, %q, %q", exit, out, stderr)
	}
	out, _, _ = try(t, attempt{Try: "tiocsti", Policy: Policy{Mode: Log}})
	if want := "\nreported: ioctl argument 1=" + fmt.Sprintf("%#x", unix.TIOCSTI) + "\n"; !strings.Contains(out, want) {
		t.Errorf("%q is missing from %q", want, out)
	}
}

func TestFiles(t *testing.T) {
	needLandlock(t, 3)
	dir := t.TempDir()
	file := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	given, readable, other := file("given"), file("readable"), file("other")
	inside, below := file("d/log"), file("readable.d/x")
	policy := Policy{Mode: On, Read: []string{readable, filepath.Dir(below), filepath.Join(dir, "missing")}, Write: []string{given}, Replace: []string{filepath.Dir(inside)}}
	for _, tc := range []struct{ try, path, want string }{
		{"read", given, "<nil>"}, {"write", given, "<nil>"}, {"remove", given, "EACCES"}, {"rename", given, "EACCES"},
		{"read", readable, "<nil>"}, {"write", readable, "EACCES"}, {"read", below, "<nil>"}, {"write", below, "EACCES"},
		{"read", other, "EACCES"}, {"write", other, "EACCES"}, {"read", dir, "EACCES"}, {"create", filepath.Join(dir, "new"), "EACCES"},
		{"read", inside, "EACCES"}, {"write", inside, "<nil>"}, {"create", inside + ".new", "<nil>"}, {"rename", inside, "<nil>"}, {"remove", inside + ".1", "<nil>"},
		{"read", "/etc/shadow", "EACCES"}, {"read", "/proc/1/mem", "EACCES"}, {"read", "/proc/self/mem", "EACCES"}, {"write", "/dev/kvm", "EACCES"},
	} {
		gets(t, attempt{Try: tc.try, Policy: policy, Arg: tc.path}, tc.want)
	}
	policy.AllFiles = true
	gets(t, attempt{Try: "write", Policy: policy, Arg: other}, "<nil>")
	policy = Policy{Mode: On, Replace: []string{filepath.Join(dir, "d")}, Listen: true}
	gets(t, attempt{Try: "unix listen", Policy: policy, Arg: filepath.Join(dir, "d", "s")}, "<nil>")
	gets(t, attempt{Try: "unix listen", Policy: policy, Arg: filepath.Join(dir, "s")}, "EACCES")
}

func TestPorts(t *testing.T) {
	needLandlock(t, 4)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	port := uint16(ln.Addr().(*net.TCPAddr).Port)
	arg := strconv.Itoa(int(port))
	gets(t, attempt{Try: "connect", Policy: Policy{Mode: On}, Arg: arg}, "<nil>")
	gets(t, attempt{Try: "connect", Policy: Policy{Mode: On, Ports: []uint16{port}}, Arg: arg}, "<nil>")
	gets(t, attempt{Try: "connect", Policy: Policy{Mode: On, Ports: []uint16{port ^ 1}}, Arg: arg}, "EACCES")
	gets(t, attempt{Try: "connect", Policy: Policy{Mode: On, Ports: []uint16{}}, Arg: arg}, "EACCES")
	gets(t, attempt{Try: "tcp bind", Policy: Policy{Mode: On, Listen: true}}, "EACCES")
	ends(t, attempt{Try: "tcp bind", Policy: Policy{Mode: On}}, "bind")
}

func TestAbstractSockets(t *testing.T) {
	needLandlock(t, 6)
	name := fmt.Sprintf("govmm-sandbox-%d", os.Getpid())
	ln, err := net.Listen("unix", "@"+name)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	gets(t, attempt{Try: "abstract", Policy: Policy{Mode: On}, Arg: name}, "EPERM")
}

func needLandlock(t *testing.T, version int) {
	t.Helper()
	out, _, _ := try(t, attempt{Try: "nothing", Policy: Policy{Mode: On}})
	for v := 1; v <= landlockABI; v++ {
		if strings.Contains(out, fmt.Sprintf("Landlock %d,", v)) && v >= version {
			return
		}
	}
	t.Skipf("THIS KERNEL HAS NO LANDLOCK %d, NOT TESTED: %s", version, out)
}

// TestThreadsOfTheProcess reads from outside what each thread of a process in the cage has.
func TestThreadsOfTheProcess(t *testing.T) {
	text, err := json.Marshal(attempt{Try: "wait", Policy: Policy{Mode: On, Keep: []int{unix.CAP_NET_ADMIN}}, VCPU: true})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), attemptVariable+"="+string(text))
	stdin, err1 := cmd.StdinPipe()
	stdout, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stdin.Close(); _ = cmd.Wait() }()
	if _, err := stdout.Read(make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	proc := fmt.Sprintf("/proc/%d", cmd.Process.Pid)
	limits, err := os.ReadFile(proc + "/limits")
	if err != nil || !strings.Contains(strings.Join(strings.Fields(string(limits)), " "), "Max core file size 0 0") {
		t.Errorf("core dumps are on: %v\n%s", err, limits)
	}
	kept := "0000000000000000"
	if os.Geteuid() == 0 {
		kept = fmt.Sprintf("%016x", 1<<unix.CAP_NET_ADMIN)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		tasks, err := filepath.Glob(proc + "/task/*/status")
		if err != nil || len(tasks) == 0 {
			t.Fatalf("no threads: %v", err)
		}
		filters := make(map[string]int)
		for _, task := range tasks {
			status := statusOf(t, task)
			for key, want := range map[string]string{"NoNewPrivs": "1", "Seccomp": "2", "CapInh": "0000000000000000", "CapAmb": "0000000000000000",
				"CapBnd": "0000000000000000", "CapPrm": kept, "CapEff": kept} {
				if key == "CapBnd" && os.Geteuid() != 0 {
					continue
				}
				if status != nil && status[key] != want {
					t.Errorf("%s: %s is %q, expected %q", task, key, status[key], want)
				}
			}
			filters[status["Seccomp_filters"]]++
		}
		if filters["2"] == 1 && filters["1"] == len(tasks)-1 { // one is the vCPU's
			return
		}
		if t.Failed() || time.Now().After(deadline) {
			t.Fatalf("filters of the threads: %v", filters)
		}
	}
}

func statusOf(t *testing.T, path string) map[string]string {
	b, err := os.ReadFile(path)
	if err != nil { // the thread has just ended
		return nil
	}
	status := make(map[string]string)
	for _, line := range strings.Split(string(b), "\n") {
		key, value, _ := strings.Cut(line, ":")
		status[key] = strings.TrimSpace(value)
	}
	return status
}

func TestLayouts(t *testing.T) {
	// struct seccomp_notif, struct seccomp_notif_resp
	if n, a := unsafe.Sizeof(notification{}), unsafe.Sizeof(answer{}); n != 80 || a != 24 {
		t.Errorf("%d and %d bytes, expected 80 and 24", n, a)
	}
}
