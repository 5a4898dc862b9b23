package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
)

// A receiver shows on its terminal how far a guest is that arrives, and has erased that
// before the guest prints; as a background job, with --json and on a pipe it shows nothing.
func TestReceiveShowsWhatArrives(t *testing.T) {
	testenv.NeedKVM(t)
	for _, tc := range []struct {
		how   string
		shows bool
	}{
		{`exec "$0" receive b --listen unix:"$1"`, true},
		{`set -m; "$0" receive b --listen unix:"$1" & read line; fg`, false},
		{`"$0" receive b --listen unix:"$1" --json --serial file:"$1".out`, false},
		{`"$0" receive b --listen unix:"$1" 2>&1 | cat`, false},
	} {
		t.Run(tc.how, func(t *testing.T) {
			t.Parallel()
			c := newCLI(t)
			socket := filepath.Join(c.dir, "socket")
			tm := c.openCommand(exec.CommandContext(t.Context(), "/bin/sh", "-c", tc.how, os.Args[0], socket))
			tm.await("listening")
			source := c.open("run", "a", "--memory", "64M", "--cmdline", "fill=32M tick=1")
			source.await("tick 1 ")
			if exit, _, stderr := c.run("migrate", "a", "--to", "unix:"+socket, "--bandwidth-limit", "16M"); exit != exitDone {
				t.Fatal(stderr)
			}
			if strings.Contains(tc.how, "--json") {
				tm.await("arrived")
			} else {
				tm.await("bad=0 ")
			}
			c.run("stop", "b", "--force")
			tm.mu.Lock()
			defer tm.mu.Unlock()
			screen := tm.screen.String()
			last := strings.LastIndex(screen, "% memory, ")
			if (last >= 0) != tc.shows {
				t.Errorf("a bar: %v, want %v: %q", last >= 0, tc.shows, screen)
			}
			if guest := strings.Index(screen, "tick "); tc.shows && (guest < last || !strings.Contains(screen[last:guest], "\r\x1b[K")) {
				t.Errorf("not erased before the guest printed: %q", screen)
			}
		})
	}
}
