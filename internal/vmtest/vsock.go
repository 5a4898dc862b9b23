package vmtest

import (
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
)

// Connect connects to the host's socket of a guest's socket device and asks for a
// port of the guest.
func Connect(t testing.TB, path string, port int) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	testenv.Check(t, err)
	t.Cleanup(func() { _ = c.Close() })
	testenv.Check(t, c.SetDeadline(time.Now().Add(testenv.Patience)))
	_, err = fmt.Fprintf(c, "CONNECT %d\n", port)
	testenv.Check(t, err)
	return c
}

// ExpectEnd expects that a connection ends without a byte.
func ExpectEnd(t testing.TB, c net.Conn) {
	t.Helper()
	if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
		t.Fatalf("expected the end of the connection, got %q, %v", b, err)
	}
}
