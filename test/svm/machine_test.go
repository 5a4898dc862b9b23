//go:build svm

package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// The tests here boot the machine; make test-svm selects them by the tag.

// TestMachine: a command's output and exit status come back, /dev/kvm opens, and files
// are the host's.
func TestMachine(t *testing.T) {
	svm := build(t)
	dir := t.TempDir()
	const script = `exec 3<>/dev/kvm && echo opens
echo "$GOVMM_TEST_WORD" >word
echo "$TMPDIR $PWD"
echo trouble >&2
kill -9 $$`
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, svm, "-memory", "512M", "-cpus", "1", "sh", "-c", script)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOVMM_TEST_WORD=a word")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit := cmd.ProcessState.ExitCode(); exit != 128+9 {
		t.Errorf("exit %d, %v", exit, err)
	}
	if want := "opens\n" + guestTmp + " " + dir + "\n"; out.String() != want {
		t.Errorf("stdout %q, want %q", &out, want)
	}
	if errs.String() != "trouble\n" {
		t.Errorf("stderr %q", &errs)
	}
	if text, err := os.ReadFile(filepath.Join(dir, "word")); err != nil || string(text) != "a word\n" {
		t.Errorf("the file has %q, %v", text, err)
	}
}
