//go:build accept

package test

import (
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/test/kernel"
)

// TestDebianImageBoots: an image of Debian's packages is imported, boots with its own kernel to
// its login, is configured by cloud-init, and is reached by ssh over the user network; it moves
// with its disk, and is reached there.
func TestDebianImageBoots(t *testing.T) {
	needSVM(t)
	testenv.NeedTools(t, "ssh", "ssh-keygen")
	qcow2, err := kernel.DebianImage()
	testenv.Check(t, err)
	dirs := []string{t.TempDir(), t.TempDir()}
	t.Setenv("XDG_DATA_HOME", dirs[0])
	h := newHost(t)
	key := filepath.Join(t.TempDir(), "key")
	tool(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
	forward := func(port int) string { return fmt.Sprintf("user,forward=%d:22", port) }
	here, there := tcpPort(t), tcpPort(t)
	args := []string{"run", "web", "--image", qcow2, "--size", "3G", "--memory", "640M", "--ssh-key", key + ".pub", "--hostname", "govmm-web", "--net", forward(here)}
	if emulated() { // slowly
		args = append(args, "--cmdline", "root=UUID="+kernel.SystemRoot+" ro "+debianCmdline())
	}
	vm := h.start(args...)
	vm.err.awaitText(t, 0, "made the disk")
	at := vm.awaitLong(0, "Debian GNU/Linux 12 ")
	vm.typeLine("")
	vm.awaitLong(at, "login:")
	ssh := func(port int, command string) string {
		t.Helper()
		var out []byte
		for deadline := time.Now().Add(bootPatience); ; time.Sleep(time.Second) {
			out, err = exec.Command("ssh", "-i", key, "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
				"-o", "ConnectTimeout=120", "-o", "LogLevel=ERROR", "-p", fmt.Sprint(port), "debian@127.0.0.1", command).CombinedOutput()
			if err == nil {
				return string(out)
			}
			if time.Now().After(deadline) {
				t.Fatalf("ssh %s: %v\n%s", command, err, out)
			}
		}
	}
	// It may find an error in what the image lacks, a tool that grows partitions for example.
	result := ssh(here, "cloud-init status --wait >/dev/null; cat /run/cloud-init/result.json")
	if t.Log(result); !strings.Contains(result, "DataSourceNoCloud [seed=/dev/vdb]") {
		t.Error("cloud-init has not taken the seed")
	}
	const asks = "hostname; cat /proc/sys/kernel/random/boot_id"
	before := ssh(here, asks)
	if !strings.HasPrefix(before, "govmm-web\n") {
		t.Errorf("the guest's name and boot: %q", before)
	}
	next, addr := h.receive("next", "--disk-dir", dirs[1], "--net", forward(there))
	if r, exit := h.migrate("web", "--to", addr, "--copy-disks", "--downtime-limit", "3s"); exit != 0 || r.Status != "completed" {
		t.Fatalf("exit %d, %+v", exit, r)
	}
	vm.wait()
	if after := ssh(there, asks); after != before {
		t.Errorf("the guest's name and boot, after its move: %q, before %q", after, before)
	}
	vm.quietly(0)
	next.quietly(0)
}

// tcpPort is a TCP port of this host's loopback address that nobody has.
func tcpPort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	testenv.Check(t, err)
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}
