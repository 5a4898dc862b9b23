package kernel

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// A stock kernel, Debian's, boots to a shell, which answers, and powers off. It
// does so unpacked by govmm and by itself.
func TestDebianShell(t *testing.T) {
	needHardware(t)
	kernel, err := DebianKernel()
	if err != nil {
		t.Fatal(err)
	}
	initrd := shellInitrd(t)
	govmm := filepath.Join(t.TempDir(), "govmm")
	if out, err := exec.Command("go", "build", "-o", govmm, "../../cmd/govmm").CombinedOutput(); err != nil {
		t.Fatalf("build govmm: %v\n%s", err, out)
	}
	for name, flags := range map[string][]string{
		"unpacked here": nil,
		"unpacks":       {"--no-unpack"},
		"two vCPUs":     {"--cpus", "2"},
		"no ACPI":       {"--cmdline", "console=ttyS0 acpi=off panic=-1"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			args := []string{"run", "--kernel", kernel, "--initrd", initrd, "--memory", "512M", "--cmdline", "console=ttyS0 panic=-1"}
			cmd := exec.CommandContext(ctx, govmm, append(args, flags...)...)
			stdin, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			out := &transcript{}
			cmd.Stdout, cmd.Stderr = out, out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			say := func(after, line string) {
				if !out.waitFor(ctx, after) {
					t.Errorf("no %q in\n%s", after, out)
					cancel()
					return
				}
				_, _ = io.WriteString(stdin, line+"\n")
			}
			say("the shell is up", "echo answer $((6*7)) of $(nproc)")
			say("answer 42 of", "poweroff -f")
			if err := <-ended; err != nil {
				t.Errorf("govmm run: %v\n%s", err, out)
			}
		})
	}
}

// needHardware skips a test that needs a KVM which runs ring 0 natively.
func needHardware(t *testing.T) {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	for _, flag := range strings.Fields(string(info)) {
		if flag == "vmx" || flag == "svm" {
			return
		}
	}
	t.Skip("needs VT-x or SVM: a software KVM does not know all instructions of a stock kernel")
}

// shellInitrd returns the path of an initial RAM disk with busybox's shell.
func shellInitrd(t *testing.T) string {
	path, err := Busybox()
	if err != nil {
		t.Fatal(err)
	}
	busybox, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const init = `#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
stty -echo
echo the shell is up
exec setsid -c sh
`
	image := Initramfs(File{Name: "bin", Mode: directory | 0o755}, File{Name: "proc", Mode: directory | 0o755},
		File{Name: "sys", Mode: directory | 0o755}, File{Name: "bin/busybox", Data: busybox}, File{Name: "init", Data: []byte(init)})
	out := filepath.Join(t.TempDir(), "initrd.img")
	if err := os.WriteFile(out, image, 0o600); err != nil {
		t.Fatal(err)
	}
	return out
}

// transcript is what a guest has written.
type transcript struct {
	mu      sync.Mutex // guards buf and changed
	buf     bytes.Buffer
	changed chan struct{} // closed at the next write
}

func (w *transcript) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.changed != nil {
		close(w.changed)
		w.changed = nil
	}
	return w.buf.Write(p)
}

func (w *transcript) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.String()
}

// waitFor waits until the guest has written text, or ctx ends.
func (w *transcript) waitFor(ctx context.Context, text string) bool {
	for {
		w.mu.Lock()
		found := strings.Contains(w.buf.String(), text)
		if w.changed == nil {
			w.changed = make(chan struct{})
		}
		changed := w.changed
		w.mu.Unlock()
		if found {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}
