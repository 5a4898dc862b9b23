package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/govmm/govmm/test/kernel"
)

// part is a package's tests that run on the emulated machine.
type part struct {
	pkg  string
	run  string // the tests, as -run takes them; empty: all
	skip []leftOut
	// linux says that the guests are Linux. QEMU 7.2 with one thread for all
	// processors then interrupts a guest whose interrupts are off, now and then:
	// seen with one vCPU, whose timer interrupted its own handler, which has a
	// lock. With a thread for each, the machine itself stands still at times.
	linux bool
	// accept says that the tests have the tag accept, and take longer.
	accept bool
}

// leftOut is a test that fails there and only there.
type leftOut struct{ name, reason string }

// tooSlow are the tests of ./vmm that trip there over time alone.
var tooSlow = []leftOut{
	{"TestHandoffUnknown", "migrations whose precopy has to end within a minute, which an emulated guest and a busy host do not promise"},
	{"TestVMMigrates", "likewise: the stop alone was estimated at four seconds on a busy host, and the limit is the default"},
}

// The tests of `make emulated`: chosen for what they say within a quarter of an
// hour on two processors.
var short = []part{
	{pkg: "./kvm"},
	{pkg: "./vmm", run: "^(TestDemoGuestMigrates|TestPausedArrivesPaused|TestVMEnds|TestVMReboots)$"},
	{pkg: "./vmm/machine", run: "^(TestStateRoundTrip|TestStateOfEverything|TestDirtyLog)$"},
	{pkg: "./test", run: "^(TestPausedArrivesPaused|TestLinuxBoots)$/^($|noacpi-2-initramfs-sysrq$)", linux: true},
}

// The tests of `make test-svm`.
var long = []part{
	{pkg: "./kvm"},
	{pkg: "./vmm", skip: tooSlow},
	{pkg: "./vmm/machine"},
	{pkg: "./virtio/net", run: "Macvtap"},
	{pkg: "./test", run: "^(TestMacvtapMoves|TestMacvtapGoesOn)$"},
	{pkg: "./test", run: "^(TestPausedArrivesPaused|TestBackings|TestPowerOff|TestReboot|TestLinuxBoots|TestLinuxRootDiskMoves|TestDebianKernel|TestDebianFromDisk|TestDebianSees|TestLinuxVsock)$", linux: true},
}

// The tests with the tag accept that only hardware virtualisation can pass.
var accept = []part{
	{pkg: "./test", run: "^TestDebianImageBoots$", linux: true, accept: true},
}

// onSVM has the parts run, each on an emulated machine of its own; what is
// compiled or fetched is so here, where it is fast and there is a network.
func onSVM(r *report, parts []part, kernels ...kernel.Variant) error {
	loud("KVM IN AN EMULATED MACHINE WITH SVM: what follows is right or wrong as on a real one, and its times mean nothing")
	dir, err := os.MkdirTemp("", "govmm-svm-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	svm, govmm := filepath.Join(dir, "svm"), filepath.Join(dir, "govmm")
	for path, pkg := range map[string]string{svm: "./test/svm", govmm: "./cmd/govmm"} {
		cmd := exec.Command("go", "build", "-o", path, pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go build %s: %w\n%s", pkg, err, out)
		}
	}
	for _, k := range kernels {
		if _, err := kernel.Build(k); err != nil {
			return err
		}
	}
	for _, p := range parts {
		if !p.accept {
			continue
		}
		if _, err := kernel.DebianImage(); err != nil {
			return err
		}
	}
	if _, _, err := kernel.CloudGuest(); err != nil {
		return err
	}
	if err := os.Setenv("GOVMM_BINARY", govmm); err != nil {
		return err
	}
	var failed []string
	for _, p := range parts {
		for _, s := range p.skip {
			r.print(fmt.Sprintf("left out: %s %s: %s\n", p.pkg, s.name, s.reason))
		}
		if err := r.goTest(p.arguments(svm)...); err != nil {
			failed = append(failed, fmt.Sprintf("%s: %v", p.pkg, err))
		}
	}
	if failed != nil {
		return fmt.Errorf("%s", strings.Join(failed, "; "))
	}
	return nil
}

// arguments of go test. Its own time-out and the machine's are for what hangs.
func (p part) arguments(svm string) []string {
	threads := "single"
	if p.linux {
		threads = "multi"
	}
	args := []string{"-count=1", "-vet=off", "-parallel", "1", "-timeout", "40m", "-exec", svm + " -timeout 45m -threads " + threads}
	if p.accept { // a cloud image, and two copies of its disk
		args = []string{"-tags", "accept", "-count=1", "-vet=off", "-timeout", "150m", "-exec", svm + " -timeout 160m -memory 5G -threads " + threads}
	}
	if p.run != "" {
		args = append(args, "-run", p.run)
	}
	var names []string
	for _, s := range p.skip {
		names = append(names, s.name)
	}
	if names != nil {
		args = append(args, "-skip", "^("+strings.Join(names, "|")+")$")
	}
	return append(args, p.pkg)
}
