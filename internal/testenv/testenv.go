// Package testenv has what the tests of several packages share: what a test
// needs of the machine it runs on, and how long it waits.
package testenv

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"testing"
	"time"

	_ "github.com/govmm/govmm/internal/supported" // Linux on x86-64 only
	"golang.org/x/sys/unix"
)

// Patience bounds each wait for something that comes at once on an idle
// machine. Only a test that fails waits that long.
var Patience = func() time.Duration {
	if Emulated() {
		return 10 * time.Minute
	}
	return 3 * time.Minute
}()

// Emulated reports whether this machine is the emulated one of test/svm, where
// times mean nothing.
func Emulated() bool { return os.Getenv("GOVMM_SVM") != "" }

// Full reports whether the tests make their long runs (make accept).
func Full() bool { return os.Getenv("GOVMM_ACCEPT") != "" }

// Check fails the test at once if err is not nil.
func Check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// NoKVM returns the reason why this process cannot use KVM on this machine, and
// nil if it can or if KVM is there and broken: then tests must fail.
func NoKVM() error {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err == nil {
		_ = f.Close() // opened for nothing else
		return nil
	}
	for _, absent := range []error{unix.ENOENT, unix.ENODEV, unix.ENXIO, unix.EACCES, unix.EPERM} {
		if errors.Is(err, absent) {
			return err
		}
	}
	return nil
}

// errShort is the reason for what make check leaves out.
var errShort = errors.New("left out by -short")

// noKVM is NoKVM for tests: with -short none uses KVM.
func noKVM() error {
	if testing.Short() {
		return errShort
	}
	return NoKVM()
}

// NeedKVM skips the test where KVM is not available, and with -short. Where
// /dev/kvm opens, the test runner (test/run) counts each skipped test as a
// failure.
func NeedKVM(t testing.TB) {
	t.Helper()
	if err := noKVM(); err != nil {
		t.Skipf("NO KVM HERE, NOT TESTED: %v", err)
	}
}

// NeedVirtualisation skips the test where KVM emulates ring 0, because the
// processor has neither VT-x nor SVM. test/run accepts this reason.
func NeedVirtualisation(t testing.TB, why string) {
	t.Helper()
	NeedKVM(t)
	flags, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`(?m)^flags\s*:.*\b(vmx|svm)\b`).Match(flags) {
		t.Skipf("needs VT-x or SVM: %s", why)
	}
}

// NeedRoot skips the test in a process without root's rights, and with -short.
func NeedRoot(t testing.TB, why string) {
	t.Helper()
	if os.Geteuid() != 0 || testing.Short() {
		t.Skipf("ROOT IS NEEDED, NOT TESTED: %s", why)
	}
}

// NeedTools fails the test if a program is not installed; with -short it skips the
// test. make setup installs all of them.
func NeedTools(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil && testing.Short() {
			t.Skipf("%s IS NOT INSTALLED HERE, NOT TESTED", name)
		} else if err != nil {
			t.Fatalf("%s is not installed: run make setup", name)
		}
	}
}

// NotShort skips the test with -short, because it fetches something from the
// network or takes long.
func NotShort(t testing.TB, why string) {
	t.Helper()
	if testing.Short() {
		t.Skipf("%v: %s", errShort, why)
	}
}

// Main runs a package's tests for its TestMain. It leaves out the examples
// where KVM is not available: an example cannot skip itself.
func Main(m *testing.M) {
	flag.Parse()
	if err := noKVM(); err != nil {
		fmt.Fprintf(os.Stderr, "NO KVM HERE, examples are skipped: %v\n", err)
		if f := flag.Lookup("test.skip"); f.Value.String() == "" {
			_ = f.Value.Set("^Example") // a pattern that is valid
		}
	}
	os.Exit(m.Run())
}
