package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
)

// build builds this program statically, as the machine needs it.
func build(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "svm")
	cmd := exec.Command("go", "build", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return path
}

// TestFailures: each failure has its message, and status 125.
func TestFailures(t *testing.T) {
	testenv.NotShort(t, "fetches Debian's kernel")
	svm := build(t)
	for want, args := range map[string][]string{
		"usage: svm":                        nil,
		"QEMU is needed":                    {"-qemu", "no-such-qemu", "true"},
		"no-such-command":                   {"no-such-command"},
		"the machine has a /dev of its own": {"true"},
		"QEMU has ended: exit status 1":     {"-memory", "lots", "true"},
		"not done within 1ms":               {"-timeout", "1ms", "true"},
	} {
		cmd := exec.Command(svm, args...)
		if want == "the machine has a /dev of its own" {
			cmd.Dir = "/dev"
		}
		out, err := cmd.CombinedOutput()
		exit := cmd.ProcessState.ExitCode()
		if !strings.Contains(string(out), want) || exit != failed && args != nil {
			t.Errorf("svm %q: exit %d, %v: %s", args, exit, err, out)
		}
	}
}

func TestWire(t *testing.T) {
	var line bytes.Buffer
	w := &wire{rw: &line}
	long := bytes.Repeat([]byte("0123456789abcdef"), maxFrame/16+1)
	if n, err := (stream{w, stdout}).Write(long); n != len(long) || err != nil {
		t.Fatal(n, err)
	}
	var got []byte
	for line.Len() > 0 {
		kind, p, err := w.receive()
		if kind != stdout || err != nil {
			t.Fatal(kind, err)
		}
		got = append(got, p...)
	}
	if !bytes.Equal(got, long) {
		t.Error("it is not what was sent")
	}
	if err := w.send(stderr, long); err == nil {
		t.Error("a frame is too long, and is sent")
	}
	for _, bad := range []string{"o\xff\xff\xff\xff", "o\x00\x00", "o\x00\x00\x00\x02x"} {
		if _, _, err := (&wire{rw: bytes.NewBufferString(bad)}).receive(); err == nil {
			t.Errorf("%q is a frame", bad)
		}
	}
}

func TestStatic(t *testing.T) {
	sh, err := os.ReadFile("/bin/sh") // every distribution links it dynamically
	if err != nil {
		t.Fatal(err)
	}
	if err := static(sh); err == nil || !strings.Contains(err.Error(), "CGO_ENABLED=0") {
		t.Errorf("/bin/sh: %v", err)
	}
	if err := static([]byte("text")); err == nil {
		t.Error("text is a program")
	}
}

func TestLastLines(t *testing.T) {
	text := strings.Repeat("line\n", 30)
	if n := strings.Count(lastLines(text, false), "line"); n != 20 {
		t.Errorf("%d lines", n)
	}
	if n := strings.Count(lastLines(text, true), "line"); n != 30 {
		t.Errorf("all: %d lines", n)
	}
}
