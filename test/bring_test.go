package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// opens reports whether a process has a file open whose name contains the text.
func (p *proc) opens(text string) bool {
	p.t.Helper()
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.cmd.Process.Pid))
	if err != nil || len(links) == 0 {
		p.t.Fatalf("no descriptors of process %d: %v", p.cmd.Process.Pid, err)
	}
	for _, l := range links {
		if to, _ := os.Readlink(l); strings.Contains(to, text) {
			return true
		}
	}
	return false
}

// TestAReceiverGivesWhatItWasGiven: a receiver without flags refuses a guest with a disk,
// a tap and a socket, and names the flags that are missing; it opens nothing, and the
// guest goes on. With these flags, or if it trusts its source, it takes the guest.
func TestAReceiverGivesWhatItWasGiven(t *testing.T) {
	needKVM(t)
	needRoot(t)
	h := newHost(t)
	image, socket := newImage(t, mib), filepath.Join(h.dir, "v")
	tap := fmt.Sprintf("gvg%d", os.Getpid()%1e6)
	here := h.start("run", "g0", "--memory", "64M", "--cmdline", "fill=8M dirty=1M verify=1 tick=0.5",
		"--disk", image, "--net", "tap="+tap+",mac=52:54:00:00:00:09", "--vsock", "path="+socket)
	here.out.awaitText(t, 0, "tick 1 ")

	bare, addr := h.receive("bare")
	for range 2 {
		r, exit := h.migrate("g0", "--to", addr)
		if exit < 3 || r.Status != "failed" || len(r.Rounds) != 0 {
			t.Fatalf("exit %d, %+v", exit, r)
		}
		want := "--disk (for disk " + image + "), --net (for net 52:54:00:00:00:09), --vsock (for vsock cid 3)"
		if !strings.HasSuffix(r.Error, want) {
			t.Errorf("the error is %q, want %q in the end", r.Error, want)
		}
		if bare.opens(image) || bare.opens("/dev/net/tun") {
			t.Error("the receiver has opened what it was not given")
		}
	}
	here.out.awaitTick(t, here.out.len(), "at the source", func(tick) bool { return true })
	h.must("stop", "--force", "bare")

	// A tap with a single queue is busy as long as the source has it: another one.
	for i, flags := range [][]string{
		{"--net", "tap", "--disk", image, "--vsock", "path=" + socket},
		{"--net", "tap", "--allow-source-paths"},
	} {
		there, addr := h.receive(fmt.Sprintf("g%d", i+1), flags...)
		r, exit := h.migrate(fmt.Sprintf("g%d", i), "--to", addr, "--downtime-limit", "3s")
		if exit != 0 || r.Status != "completed" {
			t.Fatalf("with %v: exit %d, %+v", flags, exit, r)
		}
		there.out.awaitTick(t, 0, "at the destination", func(tick) bool { return true })
		if !there.opens(image) {
			t.Error("the guest runs without its disk")
		}
	}
}

// TestARefusalTellsNothing: whatever is at a path that a source names, and is not its
// disk, the refusal has the same words, even where paths of a source are allowed.
func TestARefusalTellsNothing(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	image := newImage(t, mib)
	here := h.start("run", "here", "--memory", "64M", "--cmdline", "fill=8M tick=0.5", "--disk", image)
	here.out.awaitText(t, 0, "tick 1 ")
	there, addr := h.receive("there", "--allow-source-paths")
	small := filepath.Join(t.TempDir(), "small")
	if err := os.WriteFile(small, make([]byte, 512), 0o600); err != nil {
		t.Fatal(err)
	}
	const want = ": this host cannot open what it needs; see the destination's log"
	for _, c := range []struct{ name, target string }{
		{"nothing", ""}, {"a directory", "/etc"}, {"a file of root", "/etc/shadow"}, {"a device", "/dev/null"}, {"a smaller file", small},
		{"a loop", image}, {"below a file", "/etc/passwd/x"},
	} {
		if err := os.Remove(image); err != nil {
			t.Fatal(err)
		}
		if c.target != "" {
			if err := os.Symlink(c.target, image); err != nil {
				t.Fatal(err)
			}
		}
		r, exit := h.migrate("here", "--to", addr)
		if exit < 3 || r.Error != "refused by the destination: disk "+image+want {
			t.Errorf("%s: exit %d, %q", c.name, exit, r.Error)
		}
		if c.target == "" {
			if err := os.WriteFile(image, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	there.err.awaitText(t, 0, image+": stat: no such file or directory")
	here.out.awaitTick(t, here.out.len(), "at the source", func(tick) bool { return true })
}
