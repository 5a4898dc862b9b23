package docs

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
)

// reasons are why a block is not run, and what shows that it is right all the same.
var reasons = map[string]string{
	"two hosts":          "it is typed on two hosts; test/ has the same in network namespaces",
	"minutes":            "it takes minutes, or measures; it is a test or benchmark itself",
	"a Linux guest":      "it boots a distribution's Linux, or what lies on its disk",
	"another program":    "it needs a program that the tests do not install",
	"another hypervisor": "it is a command line of QEMU for a processor with VT-x or SVM; TestQEMUHarness has one for this KVM",
	"another block":      "the same is run in another block of the page",
	"another machine":    "it needs more memory than a test has, or another processor",
	"a terminal":         "it takes a whole terminal; a test has one",
	"a form":             "it has words in place of values",
	"an older release":   "it needs the binary of another release",
	"a service manager":  "it needs systemd and the package; TestPackageOnDebian has the same (make accept)",
	"CI runs it":         "it is what CI, or another test, runs word for word",
}

// TestBlocks runs the shell blocks of each page, in order, in one bash and in namespaces of its
// own (network, files, processes). A command must succeed, or fail if the page shows its
// error; each line of its output in the page that begins with govmm:, or has no figures, must
// be printed, with other figures. govmm run and receive stay in the background.
func TestBlocks(t *testing.T) {
	all, err := pages()
	testenv.Check(t, err)
	counts, run := map[string]int{}, 0
	byPage := map[string][]block{}
	for _, page := range all {
		blocks, err := blocksOf(page)
		if err != nil {
			t.Error(err)
		}
		for _, b := range blocks {
			if b.notRun == "" {
				byPage[page] = append(byPage[page], b)
				run++
			} else if reasons[b.notRun] == "" {
				t.Errorf("%s:%d: not run: %q is none of the reasons", page, b.line, b.notRun)
			}
			counts[b.notRun]++
		}
	}
	t.Logf("%d blocks are run", run)
	for _, why := range slices.Sorted(maps.Keys(reasons)) {
		t.Logf("%d are not: %s (%s)", counts[why], why, reasons[why])
	}
	testenv.NeedKVM(t)
	testenv.NeedRoot(t, "namespaces")
	testenv.NeedTools(t, "bash", "ip", "curl", "qemu-img", "ssh-keygen", "ping", "mount", "mke2fs", "nc", "passt", "promtool")
	bin := filepath.Join(t.TempDir(), "govmm")
	build := exec.Command("go", "build", "-o", bin, "./cmd/govmm")
	build.Dir, build.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, page := range slices.Sorted(maps.Keys(byPage)) {
		t.Run(strings.TrimSuffix(filepath.Base(page), ".md"), func(t *testing.T) {
			began := time.Now()
			sh := newShell(t, bin)
			for _, b := range byPage[page] {
				for _, s := range b.steps {
					if err := sh.step(s); err != nil {
						t.Fatalf("%s:%d: $ %s\n%v", page, s.line, s.command, err)
					}
				}
			}
			if err := sh.end(); err != nil {
				t.Fatalf("%s: %v", page, err)
			}
			t.Logf("%.1f s", time.Since(began).Seconds())
		})
	}
}
