package test

import (
	"os"
	"strings"
	"testing"

	"github.com/govmm/govmm/test/kernel"
)

// TestDebianSees: glibc's loader says which x86-64 levels the processor has, and Linux
// names the features. On an emulated SVM the guest's kernel runs without XSAVE and all
// that needs it, so a part of the third level is missing there.
func TestDebianSees(t *testing.T) {
	needSVM(t)
	loader, err := os.ReadFile("/lib64/ld-linux-x86-64.so.2")
	if err != nil {
		t.Fatal(err)
	}
	bzImage, initrd := debianFiles(t, kernel.File{Name: "ld.so", Data: loader})
	for _, c := range []struct {
		model    string
		has, not string // levels
		flags    string
	}{
		{"x86-64-v2", "x86-64-v2", "x86-64-v3", "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3 pni"},
		{"x86-64-v3", "x86-64-v3", "x86-64-v4", "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"},
	} {
		if c.model == "x86-64-v3" && emulated() {
			c.has, c.flags = "x86-64-v2", "bmi1 bmi2 f16c abm movbe"
		}
		t.Run(c.model, func(t *testing.T) {
			h := newHost(t)
			vm := &shell{proc: h.start("run", "at0", "--memory", "256M", "--cpu", c.model, "--kernel", bzImage, "--initrd", initrd,
				"--cmdline", debianCmdline())}
			vm.awaitLong(0, "init: ready")
			levels := map[string]string{}
			for line := range strings.SplitSeq(vm.does("/ld.so --help | grep x86-64-v"), "\n") {
				name, verdict, _ := strings.Cut(strings.TrimSpace(line), " ")
				if strings.HasPrefix(name, "x86-64-v") {
					levels[name] = verdict
				}
			}
			t.Logf("glibc: %v", levels)
			if !strings.Contains(levels[c.has], "supported") || strings.Contains(levels[c.not], "supported") {
				t.Errorf("glibc says of a processor that is %s: %v", c.model, levels)
			}
			have := " " + strings.Join(strings.Fields(vm.does("grep -m1 ^flags /proc/cpuinfo")), " ") + " "
			t.Logf("Linux: %s", have)
			for f := range strings.FieldsSeq(c.flags) {
				if !strings.Contains(have, " "+f+" ") {
					t.Errorf("Linux does not see %s", f)
				}
			}
			if got := vm.does("grep -m1 'model name' /proc/cpuinfo"); !strings.Contains(got, "govmm "+c.model) {
				t.Errorf("the processor's name is %q", got)
			}
			h.must("stop", "--force", "at0")
		})
	}
}
