package supported_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
)

// TestOtherSystems: a build for another processor or system says in one line that there is
// none. In the long runs it is the build of all packages, so that each that would fail in
// another way imports this one.
func TestOtherSystems(t *testing.T) {
	systems, packages := []string{"linux/arm64"}, []string{"github.com/govmm/govmm/kvm", "github.com/govmm/govmm/internal/..."}
	if testenv.Full() {
		systems, packages = []string{"linux/arm64", "linux/386", "darwin/arm64", "freebsd/amd64"}, []string{"github.com/govmm/govmm/..."}
	}
	for _, system := range systems {
		goos, goarch, _ := strings.Cut(system, "/")
		cmd := exec.Command("go", append([]string{"build"}, packages...)...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+goos, "GOARCH="+goarch, "GOFLAGS=")
		out, err := cmd.CombinedOutput()
		if err == nil {
			t.Errorf("%s: it was built", system)
			continue
		}
		var lines []string
		for line := range strings.Lines(string(out)) {
			if !strings.HasPrefix(line, "# ") && !strings.HasPrefix(line, "go: downloading ") {
				lines = append(lines, line)
			}
		}
		if len(lines) != 1 || !strings.Contains(lines[0], "undefined: govmm_supports_only_linux_on_amd64") {
			t.Errorf("%s: expected one line that says so, found %q", system, lines)
		}
	}
}
