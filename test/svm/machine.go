package main

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/govmm/govmm/test/kernel"
)

// modules are the drivers that the machine has: its own, and what tests need.
var modules = []string{"virtio_pci", "virtio_console", "9pnet_virtio", "9p", "kvm-amd", "tun", "bridge", "veth", "macvtap", "dummy", "sch_tbf", "loop"}

// machine is an emulated machine.
type machine struct {
	qemu    string
	memory  string
	cpus    int
	threads string // single or multi
	params  string // more of the kernel's command line
	verbose bool
}

// run starts the machine, runs the request on it, and ends it.
func (m *machine) run(ctx context.Context, req request) (status int, err error) {
	qemu, err := exec.LookPath(m.qemu)
	if err != nil {
		return 0, fmt.Errorf("QEMU is needed (Debian: apt-get install qemu-system-x86): %w", err)
	}
	dir, err := os.MkdirTemp("", "svm-")
	if err != nil {
		return 0, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	vmlinuz, initrd, err := m.files(dir)
	if err != nil {
		return 0, err
	}
	line, err := net.Listen("unix", filepath.Join(dir, "line"))
	if err != nil {
		return 0, err
	}
	defer func() { _ = line.Close() }()
	log := filepath.Join(dir, "kernel.log")
	cmd := exec.Command(qemu, m.arguments(dir, vmlinuz, initrd, log)...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	// Its own group: Ctrl-C is for this process, which ends QEMU.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	ended := make(chan error, 1)
	gone, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		err := cmd.Wait()
		cancel(fmt.Errorf("QEMU has ended: %w", errors.Join(err, errors.New(strings.TrimSpace(said.String())))))
		ended <- err
	}()
	// The line closes when the machine has ended or the time is up, so talk ends.
	stop := context.AfterFunc(gone, func() { _ = line.Close() })
	defer stop()
	status, err = m.talk(gone, line, req)
	if cause := context.Cause(gone); err != nil && cause != nil {
		err = cause
	}
	patience := 20 * time.Second // it powers off by itself
	if err != nil {
		patience = 0
	}
	select {
	case <-ended:
	case <-time.After(patience):
		_ = cmd.Process.Kill()
		<-ended
	}
	if text, _ := os.ReadFile(log); err != nil || m.verbose {
		fmt.Fprintf(os.Stderr, "svm: the machine's kernel says:\n%s\n", lastLines(string(text), m.verbose))
	}
	return status, err
}

// talk sends the request and copies the command's output.
func (m *machine) talk(ctx context.Context, line net.Listener, req request) (status int, err error) {
	c, err := line.Accept()
	if err != nil {
		return 0, err
	}
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	w := &wire{rw: c}
	for {
		kind, p, err := w.receive()
		if err != nil {
			return 0, fmt.Errorf("the machine is gone: %w", err)
		}
		switch kind {
		case ready:
			q, err := json.Marshal(req)
			if err == nil {
				err = w.send(ask, q)
			}
			if err != nil {
				return 0, err
			}
		case stdout:
			_, err = os.Stdout.Write(p)
		case stderr:
			_, err = os.Stderr.Write(p)
		case exited:
			return strconv.Atoi(string(p))
		case broken:
			return 0, errors.New(string(p))
		default:
			return 0, fmt.Errorf("a frame of kind %q", kind)
		}
		if err != nil {
			return 0, err
		}
	}
}

// files are the machine's kernel and an initial RAM disk with its modules and
// this program.
func (m *machine) files(dir string) (vmlinuz, initrd string, err error) {
	vmlinuz, files, err := kernel.DebianModules("linux-image-amd64", modules...)
	if err != nil {
		return "", "", err
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return "", "", err
	}
	if err := static(self); err != nil {
		return "", "", err
	}
	initrd = filepath.Join(dir, "initrd")
	image := kernel.Initramfs(append(files, kernel.File{Name: "init", Data: self})...)
	return vmlinuz, initrd, os.WriteFile(initrd, image, 0o600)
}

// static returns an error for a program that needs libraries: the machine's first
// process has none.
func static(program []byte) error {
	f, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return err
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("this program is linked dynamically: build it with CGO_ENABLED=0")
		}
	}
	return nil
}

// arguments are those of QEMU. In QEMU 7.2, la57 makes KVM in the machine use page
// tables that an emulated SVM does not walk. With pku, KVM offers protection keys to
// guests although it does not know their XCR0, since XSETBV is not intercepted.
func (m *machine) arguments(dir, vmlinuz, initrd, log string) []string {
	// Files are made as this user; only root can give them to others.
	security := "none"
	if os.Geteuid() == 0 {
		security = "passthrough"
	}
	return []string{
		"-accel", "tcg,thread=" + m.threads, "-cpu", "max,-la57,-pku", "-smp", strconv.Itoa(m.cpus), "-m", m.memory, "-machine", "q35",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "file:" + log,
		"-kernel", vmlinuz, "-initrd", initrd,
		"-append", "console=ttyS0 quiet mitigations=off nokaslr tsc=reliable panic=-1 nowatchdog random.trust_cpu=on " + m.params,
		"-virtfs", "local,path=/,mount_tag=root,multidevs=remap,security_model=" + security,
		"-chardev", "socket,id=line,path=" + filepath.Join(dir, "line"),
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=line,name=" + portName,
	}
}

// lastLines are the last lines of a log, or all of it.
func lastLines(text string, all bool) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	if all {
		return strings.Join(lines, "\n")
	}
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}
