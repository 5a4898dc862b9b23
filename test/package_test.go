package test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// makeInto runs a target of the Makefile that puts files into a directory.
func makeInto(t *testing.T, target, dir string, env ...string) {
	t.Helper()
	cmd := exec.Command("make", "-C", "..", target, "DIST="+dir)
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make %s: %v\n%s", target, err, out)
	}
}

// oneFile returns the path of the only file in a directory that matches.
func oneFile(t *testing.T, dir, pattern string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(found) != 1 {
		t.Fatalf("%s: expected one %s, found %q (%v)", dir, pattern, found, err)
	}
	return found[0]
}

// output runs a command that has to succeed.
func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	var errs bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, &errs)
	}
	return string(out)
}

// TestPackage: the Debian package has what it should, and lintian nothing to say about it.
func TestPackage(t *testing.T) {
	dir := t.TempDir()
	makeInto(t, "deb", dir)
	deb := oneFile(t, dir, "govmm_*_amd64.deb")
	said, err := exec.Command("lintian", "--profile", "debian", "--tag-display-limit", "0", deb).CombinedOutput()
	if err != nil && len(said) == 0 {
		t.Fatalf("lintian (test/setup.sh installs it): %v", err)
	}
	for line := range strings.Lines(string(said)) {
		if strings.HasPrefix(line, "E:") || strings.HasPrefix(line, "W:") {
			t.Errorf("lintian: %s", line)
		}
	}
	modes := map[string]string{}
	for line := range strings.Lines(output(t, "dpkg-deb", "-c", deb)) {
		f := strings.Fields(line)
		if f[1] != "root/root" {
			t.Errorf("%s belongs to %s", f[5], f[1])
		}
		modes[f[5]] = f[0]
	}
	for file, mode := range map[string]string{
		"./": "drwxr-xr-x", "./usr/bin/govmm": "-rwxr-xr-x", "./etc/govmm/": "drwxr-xr-x", "./etc/govmm/demo.yaml": "-rw-r--r--", "./etc/govmm/receive/": "drwxr-xr-x",
		"./usr/lib/systemd/system/govmm@.service": "-rw-r--r--", "./usr/lib/systemd/system/govmm-receive@.service": "-rw-r--r--",
		"./usr/lib/udev/rules.d/60-govmm.rules": "-rw-r--r--", "./usr/lib/sysctl.d/60-govmm.conf": "-rw-r--r--",
		"./usr/share/bash-completion/completions/govmm": "-rw-r--r--", "./usr/share/zsh/vendor-completions/_govmm": "-rw-r--r--", "./usr/share/fish/vendor_completions.d/govmm.fish": "-rw-r--r--",
		"./usr/share/doc/govmm/copyright": "-rw-r--r--", "./usr/share/doc/govmm/third-party.txt.gz": "-rw-r--r--", "./usr/share/doc/govmm/package.md.gz": "-rw-r--r--",
	} {
		if modes[file] != mode {
			t.Errorf("%s: expected %s, found %q", file, mode, modes[file])
		}
	}
	if conffiles := output(t, "dpkg-deb", "-I", deb, "conffiles"); conffiles != "/etc/govmm/demo.yaml\n" {
		t.Errorf("conffiles: %q", conffiles)
	}
	root := filepath.Join(dir, "root")
	output(t, "dpkg-deb", "-x", deb, root)
	checkPackaged(t, root, modes)
}

// checkPackaged checks that what is made of the commands is there for each of them, and that the
// files of systemd are well-formed.
func checkPackaged(t *testing.T, root string, modes map[string]string) {
	binary := filepath.Join(root, "usr/bin/govmm")
	complete := func(words ...string) (names []string) {
		for line := range strings.Lines(output(t, binary, append(append([]string{"__complete"}, words...), "")...)) {
			if name, _, ok := strings.Cut(line, "\t"); ok {
				names = append(names, name)
			}
		}
		return names
	}
	commands := complete()
	if len(commands) < 20 || !slices.Contains(commands, "migrate") {
		t.Fatalf("govmm has the commands %q", commands)
	}
	for _, c := range commands {
		pages := []string{c}
		if c == "image" || c == "certs" {
			for _, sub := range complete(c) {
				pages = append(pages, c+"-"+sub)
			}
		}
		for _, page := range pages {
			if page != "help" && modes["./usr/share/man/man1/govmm-"+page+".1.gz"] != "-rw-r--r--" {
				t.Errorf("there is no manual page of govmm %s", page)
			}
		}
	}
	if out, err := exec.Command(binary, "config", filepath.Join(root, "etc/govmm/demo.yaml")).CombinedOutput(); err != nil {
		t.Errorf("demo.yaml: %v: %s", err, out)
	}
	if out, err := exec.Command("systemd-sysusers", "--dry-run", filepath.Join(root, "usr/lib/sysusers.d/govmm.conf")).CombinedOutput(); err != nil {
		t.Errorf("systemd-sysusers: %v: %s", err, out)
	}
}
