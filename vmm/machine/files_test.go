package machine

import (
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/vmtest"
	"golang.org/x/sys/unix"
)

// TestTooFewFiles: a process that may not open enough files gets one clear error before the
// guest runs, also if the machine alone could be made.
func TestTooFewFiles(t *testing.T) {
	var before unix.Rlimit
	check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &before))
	fd, err := unix.Eventfd(0, 0)
	check(t, err)
	check(t, unix.Close(fd))
	for more, says := range map[uint64]string{
		3:              "too many open files: the VM's process needs more open files: raise the limit",
		spareFiles + 2: "open files, 64 of them for its API and migrations, and its process may have",
	} {
		spec := testSpec(t, 1, vmtest.Obey)
		check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(fd) + more, Max: before.Max}))
		m, err := New(spec, Ends{}, nil)
		check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &before))
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%d more files: %v", more, err)
		}
		if err == nil {
			check(t, m.Close())
		}
	}
}
