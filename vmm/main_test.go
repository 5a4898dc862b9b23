package vmm

import (
	"net"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/internal/vmtest"
)

var (
	check    = testenv.Check
	needKVM  = testenv.NeedKVM
	patience = testenv.Patience
)

func TestMain(m *testing.M) { testenv.Main(m) }

// testConfig is a small machine that runs code, 32-bit flat, at 1 MiB.
func testConfig(cpus int, code []byte) Config {
	return Config{Name: "test", CPUs: cpus, Memory: 16 << 20, Kernel: vmtest.Kernel(code)}
}

// listen returns a listener on a port of this host.
func listen(t testing.TB) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	return ln
}
