package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/image"
	"github.com/govmm/govmm/internal/testenv"
)

// command runs a command line.
func command(args ...string) (code int, stdout, stderr string) {
	var out, errs strings.Builder
	code = govmm(args, &out, &errs)
	return code, out.String(), errs.String()
}

// qcow2 makes an image of 1 MiB that begins with a text.
func qcow2(t *testing.T, dir, text string, args ...string) string {
	t.Helper()
	testenv.NeedTools(t, "qemu-img")
	raw, path := filepath.Join(dir, "source"), filepath.Join(dir, "a.qcow2")
	b := make([]byte, 1<<20)
	copy(b, text)
	testenv.Check(t, os.WriteFile(raw, b, 0o600))
	out, err := exec.Command("qemu-img", append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, args...), raw, path)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	testenv.Check(t, os.Remove(raw))
	return path
}

func TestImageImport(t *testing.T) {
	dir := t.TempDir()
	from, to := qcow2(t, dir, "hello"), filepath.Join(dir, "disk.raw")
	code, out, errs := command("image", "import", from, to, "--size", "2M")
	if code != exitDone || errs != "" || !strings.HasPrefix(out, to+": 2.00 MiB, of which 4.00 KiB were written, from "+from+" (qcow2) in ") {
		t.Fatalf("%d, %q, %q", code, out, errs)
	}
	b, err := os.ReadFile(to)
	if err != nil || len(b) != 2<<20 || !strings.HasPrefix(string(b), "hello\x00") {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	for args, want := range map[string]string{
		from + " " + to:                          "without --force",
		from + " " + to + " --force --size 512K": "is not made smaller",
		from + "x " + to:                         "no such file",
	} {
		code, out, errs := command(append([]string{"image", "import"}, strings.Fields(args)...)...)
		if code != exitFailed || out != "" || !strings.Contains(errs, want) || strings.Count(errs, "\n") != 1 {
			t.Errorf("%s: %d, %q, %q", args, code, out, errs)
		}
	}
	for args, want := range map[string]string{
		"import":                      "expected FILE and DISK",
		"import a b c":                "expected FILE and DISK",
		"import a b --format vhd":     "expected raw or qcow2",
		"import a b --progress x":     "expected auto or none",
		"info":                        "expected one FILE",
		"info a --format x":           "expected raw or qcow2",
		"export a":                    "expected import or info",
		"":                            "expected import or info",
		"import a b --size 1e3":       "expected a whole number",
		"import a b --format raw --x": "unknown flag",
	} {
		code, _, errs := command(append([]string{"image"}, strings.Fields(args)...)...)
		if code != exitUsage || !strings.Contains(errs, want) {
			t.Errorf("%s: %d, %q", args, code, errs)
		}
	}
}

func TestImageInfo(t *testing.T) {
	dir := t.TempDir()
	path := qcow2(t, dir, "hello", "-o", "cluster_size=4k,lazy_refcounts=on")
	code, out, errs := command("image", "info", path)
	for _, want := range []string{"format  qcow2\n", "disk    1.00 MiB (1048576 bytes)\n", "version 3, clusters of 4.00 KiB, zlib where compressed, lazy reference counts\n"} {
		if code != exitDone || errs != "" || !strings.Contains(out, want) {
			t.Errorf("%d, %q, %q; want %q", code, out, errs, want)
		}
	}
	top := filepath.Join(dir, "top.qcow2")
	if out, err := exec.Command("qemu-img", "create", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", top).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	_, out, errs = command("image", "info", "--json", top)
	var info image.Info
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatalf("%v: %q, %q", err, out, errs)
	}
	if info.Format != image.QCOW2 || info.Size != 1<<20 || info.Qcow2.Version != 3 || info.Qcow2.ClusterSize != 64<<10 ||
		len(info.Below) != 1 || info.Below[0] != (image.Layer{Name: "a.qcow2", Format: image.QCOW2, Size: 1 << 20}) {
		t.Errorf("%+v", info)
	}
}
