package unixsock_test

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/govmm/govmm/internal/unixsock"
)

func listen(t *testing.T, path string) *unixsock.Listener {
	t.Helper()
	l, err := unixsock.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func dial(t *testing.T, path string) {
	t.Helper()
	c, err := unixsock.Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
}

// A path that is longer than a socket address works as any other.
func TestLongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 100))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "socket")
	l := listen(t, path)
	if got := l.Addr().String(); got != path {
		t.Errorf("the address is %q", got)
	}
	dial(t, path)
	if _, err := unixsock.Listen(path); !errors.Is(err, unixsock.ErrInUse) {
		t.Errorf("a second listener: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the path after Close: %v", err)
	}
}

// A client that finds the path is never refused, and the socket is its owner's
// from the first moment.
func TestListensBeforeItAppears(t *testing.T) {
	for range 200 {
		path := filepath.Join(t.TempDir(), "s")
		var tried sync.WaitGroup
		tried.Go(func() {
			for {
				c, err := net.Dial("unix", path)
				if errors.Is(err, fs.ErrNotExist) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				_ = c.Close()
				if st, err := os.Lstat(path); err == nil && st.Mode().Perm() != 0o600 {
					t.Errorf("mode %v", st.Mode())
				}
				return
			}
		})
		l := listen(t, path)
		tried.Wait()
		_ = l.Close()
	}
}

// Close removes its own path once: a path that another listener has made
// meanwhile stays.
func TestCloseTwice(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l := listen(t, path)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	listen(t, path)
	_ = l.Close()
	dial(t, path)
}
