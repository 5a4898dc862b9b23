package test

import (
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/govmm/govmm/test/kernel"
)

// BenchmarkLinuxBoots takes the time from the start of the process to the
// guest's first process, in turn with QEMU, whose quickest machine is microvm
// with qboot, both with the same kernel, initial RAM disk, command line and
// memory. QEMU gets no devices but the serial port; govmm's guest has a PCI bus
// with its entropy source and balloon besides.
func BenchmarkLinuxBoots(b *testing.B) {
	needKVM(b)
	qemu := qemuBinary()
	if qemu == "" {
		b.Skip("NO QEMU HERE, NOT COMPARED")
	}
	l := linux{variant: kernel.NoACPI, cpus: 1, memory: "192M", program: "memhog", words: "size=1M"}
	f := l.prepare(b)
	h := newHost(b)
	t := newTurns(b)
	n := 0
	for b.Loop() {
		n++
		t.add("govmm", untilInit(b, h.command("run", fmt.Sprintf("b%d", n), "--cpus", "1", "--memory", l.memory,
			"--kernel", f.kernel, "--initrd", f.initrd, "--cmdline", l.cmdline(f))))
		t.add("QEMU microvm", untilInit(b, exec.Command(qemu, "-M", "microvm,acpi=off", "-bios", "qboot.rom",
			"-accel", "kvm", "-cpu", "host,-arch-capabilities", "-m", l.memory, "-smp", "1", "-nodefaults", "-display", "none",
			"-no-reboot", "-serial", "stdio", "-kernel", f.kernel, "-initrd", f.initrd, "-append", l.cmdline(f))))
	}
	t.ratio("govmm", "QEMU microvm", "of-QEMU")
	b.ReportMetric(0, "ns/op")
	for _, name := range t.names {
		b.Logf("%-14s %6.2f s to the first process (median of %d)", name, median(t.took[name]), len(t.took[name]))
	}
}

// untilInit starts a VMM, takes the time until its guest's kernel says that it
// runs the first process, and ends it.
func untilInit(b *testing.B, cmd *exec.Cmd) time.Duration {
	b.Helper()
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	p := &proc{t: b, cmd: cmd, out: newLines(), done: make(chan struct{})}
	go func() {
		p.out.from(stdout)
		_ = cmd.Wait() // killed
		close(p.done)
	}()
	defer func() {
		_ = cmd.Process.Kill()
		<-p.done
	}()
	p.awaitLong(0, "Run /init as init process")
	return time.Since(began)
}
