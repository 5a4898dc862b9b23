package test

import (
	"io"
	"strings"
	"testing"
	"time"
)

// TestConsole: a line is attached to after the start, by one who types and by others who look
// on; one that follows stays with the guest when it moves.
func TestConsole(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	from := h.start("run", "co", "--serial", "null", "--memory", "32M", "--cmdline", "tick=0.2")
	from.err.awaitText(t, 0, "its API socket is")

	// Who types, on a pipe.
	cmd := h.command("console", "co")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out := newLines()
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go out.from(pipe)
	out.awaitText(t, 0, "type help") // written before it was attached to
	if _, err := io.WriteString(in, "help\r"); err != nil {
		t.Fatal(err)
	}
	out.awaitText(t, 0, "rewrite this much of it")
	if _, errs, exit := h.run("console", "co"); exit == 0 || !strings.Contains(errs, "another one writes") {
		t.Errorf("a second writer: exit %d, %q", exit, errs)
	}
	if _, errs, exit := h.run("console", "co", "--line", "console"); exit == 0 || !strings.Contains(errs, "has no console") {
		t.Errorf("a line that is not there: exit %d, %q", exit, errs)
	}

	follower := h.start("console", "co", "--read-only", "--follow")
	follower.out.awaitText(t, 0, "tick ")
	there, addr := h.receive("cp", "--serial", "null")
	time.Sleep(time.Second) // the follower has seen the receiver
	if r, exit := h.migrate("co", "--to", addr); exit != 0 {
		t.Fatalf("exit %d, %+v", exit, r)
	}
	from.wait()
	follower.err.awaitText(t, 0, "another process of this host now")
	follower.out.awaitText(t, follower.out.len(), "tick ")
	if err := cmd.Wait(); err != nil {
		t.Errorf("the end of the line: %v", err)
	}
	h.must("stop", "--force", "cp")
	there.wait()
	if exit := follower.wait(); exit != 0 {
		t.Errorf("the follower ends with %d", exit)
	}
}
