//go:build accept

package test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/vmtest"
)

// machine is a Debian in namespaces of its own, with systemd, on this kernel and its KVM.
type machine struct {
	t    *testing.T
	root string
	init int // process 1 of it, here
}

// newMachine makes one and starts it.
func newMachine(t *testing.T) *machine {
	t.Helper()
	needRoot(t)
	m := &machine{t: t, root: filepath.Join(t.TempDir(), "debian")}
	if made := os.Getenv("GOVMM_DEBIAN"); made != "" { // by an earlier debootstrap, for a run that is sooner there
		output(t, "cp", "-a", made, m.root)
	} else {
		output(t, "debootstrap", "--variant=minbase", "--include=systemd-sysv,udev,dbus,iproute2,man-db", "bookworm", m.root)
	}
	var said bytes.Buffer
	cmd := exec.Command("systemd-nspawn", "--quiet", "--directory="+m.root, "--boot", "--register=no", "--keep-unit", "--console=pipe", "--bind=/dev/kvm", "--bind=/dev/net/tun", "--bind=/dev/userfaultfd")
	cmd.Env = append(os.Environ(), "SYSTEMD_SECCOMP=0") // its own filter would forbid govmm's
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		_ = syscall.Kill(m.init, syscall.SIGKILL) // all of its processes with it
		select {
		case <-ended:
		case <-time.After(patience):
			_ = cmd.Process.Kill()
			<-ended
		}
	})
	for limit := time.Now().Add(patience); ; time.Sleep(200 * time.Millisecond) {
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid))
		if m.init, _ = strconv.Atoi(strings.TrimSpace(string(children))); m.init != 0 {
			if out, _ := m.try("systemctl", "is-system-running", "--wait"); out == "running" || out == "degraded" {
				// Which devices a unit may use is systemd's to say there, too.
				if _, err := m.try("mount", "-o", "remount,bind,rw", deviceGroups); err == nil {
					m.must("systemctl", "daemon-reexec")
					_, _ = m.try("systemctl", "is-system-running", "--wait")
				}
				return m
			}
		}
		if time.Now().After(limit) {
			t.Fatalf("the machine does not start: %s", &said)
		}
	}
}

// try runs a command there, and returns what it prints, both streams.
func (m *machine) try(words ...string) (string, error) {
	enter := []string{"-t", strconv.Itoa(m.init), "-m", "-u", "-i", "-n", "-p", "-r", "-w", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8"}
	out, err := exec.Command("nsenter", append(enter, words...)...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// must runs a command there that has to succeed.
func (m *machine) must(words ...string) string {
	m.t.Helper()
	out, err := m.try(words...)
	if err != nil {
		journal, _ := m.try("journalctl", "--no-pager", "-n", "60", "-o", "cat")
		m.t.Fatalf("%q: %v\n%s\n%s", words, err, out, journal)
	}
	return out
}

// await runs a command until it prints what is wanted.
func (m *machine) await(want string, words ...string) string {
	m.t.Helper()
	for limit := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		out, _ := m.try(words...)
		if strings.Contains(out, want) {
			return out
		}
		if time.Now().After(limit) {
			m.t.Fatalf("%q: expected %q, found\n%s", words, want, out)
		}
	}
}

// state checks a unit's state and result.
func (m *machine) state(unit, active, result string) {
	m.t.Helper()
	m.await(active, "systemctl", "show", "-P", "ActiveState", unit)
	if r := m.must("systemctl", "show", "-P", "Result", unit); r != result {
		m.t.Errorf("%s: the result is %s, expected %s", unit, r, result)
	}
}

// pid is the main process of a unit.
func (m *machine) pid(unit string) string {
	m.t.Helper()
	return m.must("systemctl", "show", "-P", "MainPID", unit)
}

// write writes a file there.
func (m *machine) write(path, text string) {
	m.t.Helper()
	if err := os.WriteFile(filepath.Join(m.root, path), []byte(text), 0o644); err != nil {
		m.t.Fatal(err)
	}
}

// TestPackageOnDebian: the package is installed on a Debian 12 that runs, its units run guests,
// in the sandbox and as their user; they go on while it is upgraded, then in a process of the new
// version, move, and end; it is not removed while they run, and leaves what is not its own.
func TestPackageOnDebian(t *testing.T) {
	needKVM(t)
	m := newMachine(t)
	dir := t.TempDir()
	makeInto(t, "deb", dir, "DEB_VERSION=0.1.0~test1")
	makeInto(t, "deb", dir, "DEB_VERSION=0.1.0~test2")
	for i := range 2 {
		name := fmt.Sprintf("govmm_0.1.0~test%d_amd64.deb", i+1)
		output(t, "cp", filepath.Join(dir, name), filepath.Join(m.root, "srv", name))
	}
	t.Log(m.must("dpkg", "-i", "/srv/govmm_0.1.0~test1_amd64.deb"))
	units := []string{"govmm@demo.service", "govmm-receive@demo.service"}
	if out := m.must("systemd-analyze", "verify", units[0], units[1]); out != "" {
		t.Errorf("systemd-analyze verify: %s", out)
	}
	for _, unit := range units { // at most 2.0 of 10
		if out, err := m.try("systemd-analyze", "security", "--no-pager", "--threshold=20", unit); err != nil {
			t.Errorf("systemd-analyze security %s: %s", unit, out)
		}
	}

	const unit = "govmm@demo"
	edited := m.must("cat", "/etc/govmm/demo.yaml") + "\n# edited\n"
	m.write("/etc/govmm/demo.yaml", edited)
	m.must("systemctl", "start", unit)
	first := m.pid(unit)
	m.await("tick 1 ", "journalctl", "-o", "cat", "-u", unit)
	if out := m.must("govmm", "info", "demo"); !strings.Contains(out, "sandbox     on,") || strings.Contains(out, "missing") || !strings.Contains(out, "seccomp, no capabilities") {
		t.Errorf("govmm info: %s", out)
	}
	if ids, user := m.must("grep", "^Uid:", "/proc/"+first+"/status"), m.must("id", "-u", "govmm"); ids != "Uid:"+strings.Repeat("\t"+user, 4) {
		t.Errorf("the VM's process has %q, and the user govmm is %s", ids, user)
	}

	m.upgradePackage(unit, first, edited)
	if out, err := m.try("dpkg", "-r", "govmm"); err == nil || !strings.Contains(out, "the package is not removed while VMs run: govmm@demo.service") {
		t.Errorf("dpkg -r while a VM runs: %v\n%s", err, out)
	}
	m.await("running", "govmm", "ps")
	m.devices(unit)
	m.moveTo()
	m.endings(unit)
	m.button()

	t.Log(m.must("dpkg", "-r", "govmm"))
	if left := m.must("cat", "/etc/govmm/demo.yaml"); left != strings.TrimSpace(edited) {
		t.Errorf("after its removal the configuration is %q", left)
	}
	t.Log(m.must("dpkg", "--purge", "govmm"))
	if left, _ := m.try("ls", "-A", "/etc/govmm", "/etc/govmm/receive", "/var/lib/govmm-units"); !strings.Contains(left, "there.yaml") || strings.Contains(left, "demo.yaml") {
		t.Errorf("after the purge there is %s", left)
	}
}

// upgradePackage installs the next version, and lets the guest go on in it.
func (m *machine) upgradePackage(unit, first, edited string) {
	m.t.Helper()
	out := m.must("dpkg", "-i", "/srv/govmm_0.1.0~test2_amd64.deb")
	if !strings.Contains(out, "systemctl reload 'govmm@*'") {
		m.t.Errorf("the upgrade of the package says nothing of the VMs that run: %s", out)
	}
	if now := m.pid(unit); now != first {
		m.t.Errorf("the main process is %s, expected %s, as before the upgrade of the package", now, first)
	}
	if now := m.must("cat", "/etc/govmm/demo.yaml"); now != strings.TrimSpace(edited) {
		m.t.Errorf("the upgrade of the package changed the configuration: %q", now)
	}
	if exe := m.must("readlink", "/proc/"+first+"/exe"); exe != "/usr/bin/govmm (deleted)" {
		m.t.Errorf("the VM's process runs %q", exe)
	}
	ticks := strings.Count(m.must("journalctl", "-o", "cat", "-u", unit), "\ntick ")
	m.must("systemctl", "reload", unit)
	second := m.pid(unit)
	if second == first || second == "0" {
		m.t.Errorf("after the upgrade in place the main process is %s", second)
	}
	if exe := m.must("readlink", "/proc/"+second+"/exe"); exe != "/usr/bin/govmm" {
		m.t.Errorf("the process of the upgrade runs %q", exe)
	}
	if group := m.must("cat", "/proc/"+second+"/cgroup"); !strings.Contains(group, "/govmm@demo.service") {
		m.t.Errorf("the process of the upgrade is in %s", group)
	}
	for _, want := range []string{"NoNewPrivs:\t1", "CapBnd:\t0000000000000000"} { // the unit's, too
		if status := m.must("cat", "/proc/"+second+"/status"); !strings.Contains(status, want) {
			m.t.Errorf("no %q of the process of the upgrade: %s", want, status)
		}
	}
	m.await(fmt.Sprintf("tick %d ", ticks+2), "journalctl", "-o", "cat", "-u", unit)
	if ps := m.must("govmm", "ps"); !strings.Contains(ps, second) {
		m.t.Errorf("govmm ps: %s", ps)
	}
	journal := m.must("journalctl", "-o", "cat", "-u", unit)
	for line := range strings.Lines(journal) {
		if strings.HasPrefix(line, "tick ") && !strings.Contains(line, " bad=0 ") || strings.Contains(line, "control group") {
			m.t.Errorf("in the journal: %s", line)
		}
	}
}

// deviceGroups is where control groups of version 1 have the devices.
const deviceGroups = "/sys/fs/cgroup/devices"

// devices checks which devices the processes of a unit may use.
func (m *machine) devices(unit string) {
	m.t.Helper()
	if _, err := os.Stat(deviceGroups); err != nil {
		m.t.Logf("the devices of units are not looked at, on this host with control groups of version 2: %v", err)
		return
	}
	m.must("mknod", "/srv/fuse", "c", "10", "229")
	m.must("mknod", "/srv/loop0", "b", "7", "0")
	m.must("mknod", "/srv/mem", "c", "1", "1")
	group := deviceGroups + m.must("systemctl", "show", "-P", "ControlGroup", unit)
	for device, want := range map[string]string{"/dev/kvm": "opened", "/dev/net/tun": "opened", "/dev/userfaultfd": "opened", "/dev/null": "opened", "/dev/urandom": "opened",
		"/srv/fuse": "Operation not permitted", "/srv/loop0": "Operation not permitted", "/srv/mem": "Operation not permitted"} {
		if out, err := m.try("sh", "-c", "echo $$ >"+group+"/cgroup.procs && exec 3<>"+device+" && echo opened"); !strings.HasSuffix(out, want) {
			m.t.Errorf("%s in %s: %q, %v; expected %s", device, group, out, err, want)
		}
	}
}

// button stops units by their guests' power buttons: one that obeys, and one that does not.
func (m *machine) button() {
	m.t.Helper()
	for name, code := range map[string][]byte{"obeys": obeys, "ignores": ignores} {
		unit := "govmm@" + name
		m.write("/srv/"+name, string(vmtest.Kernel(code)))
		m.write("/etc/govmm/"+name+".yaml", "kernel: /srv/"+name+"\nserial: \"null\"\nmemory: 16M\n")
		m.must("mkdir", "-p", "/etc/systemd/system/"+unit+".service.d")
		m.write("/etc/systemd/system/"+unit+".service.d/time.conf", "[Service]\nExecStop=\nExecStop=/usr/bin/govmm stop %i --timeout 1s --then-force\n")
		m.must("systemctl", "daemon-reload")
		m.must("systemctl", "start", unit)
		time.Sleep(time.Second) // the guest listens: it does nothing else before
		m.must("systemctl", "stop", unit)
		m.state(unit, "inactive", "success")
		said := m.must("journalctl", "-o", "cat", "-u", unit)
		if off, forced := strings.Contains(said, ": the guest powered off"), strings.Contains(said, "has not powered off within 1s; it was asked to, and may still do so; it is ended now"); off != (name == "obeys") || forced == off {
			m.t.Errorf("%s: %s", unit, said)
		}
	}
}

// moveTo moves the guest to a receiver that is a unit, by TLS, and ends it there.
func (m *machine) moveTo() {
	m.t.Helper()
	m.must("sh", "-c", "cd /root && govmm certs init ca && govmm certs issue ca here,127.0.0.1 && cp ca/here/*.pem /etc/govmm/tls && chown root:govmm /etc/govmm/tls/*.pem && chmod 640 /etc/govmm/tls/key.pem")
	m.write("/etc/govmm/receive/there.yaml", "listen: 127.0.0.1:7000\ntls-dir: /etc/govmm/tls\ntls-allow: here\n")
	m.must("systemctl", "start", "govmm-receive@there")
	m.must("govmm", "migrate", "demo", "--to", "127.0.0.1:7000", "--tls-dir", "/etc/govmm/tls")
	m.state("govmm@demo", "inactive", "success")
	m.await("tick ", "journalctl", "-o", "cat", "-u", "govmm-receive@there")
	if out := m.must("govmm", "migrations"); !strings.Contains(out, "completed") {
		m.t.Errorf("govmm migrations: %s", out)
	}
	m.must("systemctl", "stop", "govmm-receive@there")
	m.state("govmm-receive@there", "inactive", "success")
}

// endings ends units in each way.
func (m *machine) endings(unit string) {
	m.t.Helper()
	m.must("systemctl", "start", unit)
	m.must("systemctl", "stop", unit)
	m.state(unit, "inactive", "success")

	m.must("systemctl", "start", unit)
	m.must("govmm", "stop", "--force", "demo") // the guest powers off by itself, as the unit sees it
	m.state(unit, "inactive", "success")
	if out := m.must("journalctl", "-o", "cat", "-u", unit); strings.Contains(out, "no VM named") {
		m.t.Errorf("the unit stops a VM that has ended: %s", out)
	}

	m.must("systemctl", "start", unit)
	m.must("systemctl", "reload", unit)
	m.must("sh", "-c", "kill -KILL "+m.pid(unit)) // a process that systemd has not started
	m.state(unit, "failed", "signal")
	m.must("systemctl", "reset-failed", unit)

	if _, err := m.try("systemctl", "start", "govmm@none"); err == nil {
		m.t.Error("a unit without a description started")
	}
	m.await("/etc/govmm/none.yaml", "journalctl", "-o", "cat", "-u", "govmm@none")
	m.must("systemctl", "reset-failed", "govmm@none")
}
