package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	portName     = "govmm"        // of the virtio-serial port
	guestTmp     = "/run/tmp"     // in memory, as sockets and locks do not cross 9p
	guestRuntime = "/run/runtime" // likewise
)

// ownDirectories are directories that do not come from the host.
var ownDirectories = []string{"/dev", "/proc", "/sys", "/run"}

// guestMain is the machine's first process. It powers the machine off, so it does not
// return.
func guestMain() {
	w, err := startGuest()
	if err != nil {
		fmt.Println("svm: the machine does not start:", err) // the serial line
		powerOff()
	}
	status, err := serve(w)
	unix.Sync()
	if err != nil {
		_ = w.send(broken, []byte(err.Error()))
	} else {
		_ = w.send(exited, fmt.Append(nil, status))
	}
	powerOff()
}

func powerOff() {
	time.Sleep(100 * time.Millisecond) // QEMU has read what was sent
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {} // the first process does not end
}

// startGuest loads the drivers, mounts what there is, and opens the line.
func startGuest() (*wire, error) {
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := mount(m[0], m[0], m[1], ""); err != nil {
			return nil, err
		}
	}
	files, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return nil, err
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	for _, f := range files { // in order
		data, err := os.ReadFile(f)
		if err == nil {
			err = unix.InitModule(data, moduleParameters(string(cmdline), f))
		}
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("load %s: %w", f, err)
		}
	}
	if err := hostRoot(); err != nil {
		return nil, err
	}
	if err := loopbackUp(); err != nil {
		return nil, fmt.Errorf("loopback: %w", err)
	}
	open := unix.Rlimit{Cur: 1 << 16, Max: 1 << 16}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &open); err != nil {
		return nil, fmt.Errorf("allow open files: %w", err)
	}
	port, err := openPort()
	if err != nil {
		return nil, err
	}
	return &wire{rw: port}, nil
}

// moduleParameters are the parameters for a module on the kernel's command line,
// NAME.PARAMETER=VALUE. The module's file is NUMBER-NAME.ko.
func moduleParameters(cmdline, file string) string {
	_, name, _ := strings.Cut(strings.TrimSuffix(filepath.Base(file), ".ko"), "-")
	var own []string
	for _, word := range strings.Fields(cmdline) {
		if p, ok := strings.CutPrefix(word, name+"."); ok {
			own = append(own, p)
		}
	}
	return strings.Join(own, " ")
}

// hostRoot makes the host's files the root, with the kernel's own on top.
func hostRoot() error {
	const root = "/root"
	// Tests map files, which needs a cache; nothing else changes the files.
	if err := mount("root", "9p", root, "trans=virtio,version=9p2000.L,msize=512000,cache=mmap,access=any"); err != nil {
		return err
	}
	for _, d := range []string{"/proc", "/sys", "/dev"} {
		if err := unix.Mount(d, root+d, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", d, err)
		}
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	for _, m := range [][3]string{
		{"tmpfs", "/run", "mode=0755"}, {"devpts", "/dev/pts", ""}, {"tmpfs", "/dev/shm", ""}, {"hugetlbfs", "/dev/hugepages", ""},
		{"cgroup2", "/sys/fs/cgroup", ""},
	} {
		if err := mount(m[0], m[0], m[1], m[2]); err != nil {
			return err
		}
	}
	for _, d := range []string{guestTmp, guestRuntime, "/run/netns", "/run/lock"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	return os.Chmod(guestTmp, 0o777|os.ModeSticky)
}

// mount mounts a file system. It makes the directory if it can.
func mount(source, kind, at, options string) error {
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, at, kind, 0, options); err != nil {
		return fmt.Errorf("mount %s on %s: %w", kind, at, err)
	}
	return nil
}

func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(s) }()
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, lo)
}

// openPort opens the virtio-serial port by its name. The driver learns the name a
// little after it was loaded.
func openPort() (*os.File, error) {
	for range 600 {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			if text, err := os.ReadFile(n); err == nil && strings.TrimSpace(string(text)) == portName {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR, 0)
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	return nil, fmt.Errorf("no virtio-serial port %s", portName)
}

// serve runs what the host asks for and returns its exit status.
func serve(w *wire) (status int, err error) {
	if err := w.send(ready, nil); err != nil {
		return 0, err
	}
	kind, p, err := w.receive()
	if err != nil {
		return 0, err
	}
	var req request
	if kind != ask || json.Unmarshal(p, &req) != nil || len(req.Argv) == 0 {
		return 0, fmt.Errorf("not a request: %q", p)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	var copies sync.WaitGroup
	files := []*os.File{null}
	for _, kind := range []byte{stdout, stderr} {
		r, out, err := os.Pipe()
		if err != nil {
			return 0, err
		}
		files = append(files, out)
		copies.Go(func() { _, _ = io.Copy(stream{w, kind}, r) })
	}
	process, err := os.StartProcess(req.Argv[0], req.Argv, &os.ProcAttr{Dir: req.Dir, Env: req.Env, Files: files})
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		_ = f.Close()
	}
	if status, err = reap(process.Pid); err != nil {
		return 0, err
	}
	done := make(chan struct{})
	go func() { copies.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(2 * time.Second): // a process that it left behind holds its output
	}
	return status, nil
}

// reap waits for a process, and for every orphan, as a first process must.
func reap(pid int) (status int, err error) {
	for {
		var ws unix.WaitStatus
		got, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, err
		case got == pid && ws.Signaled():
			return 128 + int(ws.Signal()), nil // as a shell does
		case got == pid && ws.Exited():
			return ws.ExitStatus(), nil
		}
	}
}
