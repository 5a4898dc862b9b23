package test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
)

const hugePagesFile = "/proc/sys/vm/nr_hugepages"

// reserveHugePages reserves n more huge pages of 2 MiB until the test ends.
func reserveHugePages(t testing.TB, n int) {
	t.Helper()
	old, err := os.ReadFile(hugePagesFile)
	if err != nil {
		t.Fatal(err)
	}
	had, err := strconv.Atoi(strings.TrimSpace(string(old)))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(hugePagesFile, []byte(fmt.Sprint(had+n)), 0o644); err != nil {
		t.Fatalf("reserve huge pages (these tests run as root): %v", err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(hugePagesFile, old, 0o644); err != nil {
			t.Error(err)
		}
	})
}
