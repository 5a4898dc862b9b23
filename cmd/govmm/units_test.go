package main

import (
	"math"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/migrate"
)

func TestParseSize(t *testing.T) {
	for s, want := range map[string]uint64{
		"0": 0, "1": 1, "4096": 4096, "1K": 1024, "1k": 1024, "512M": 512 << 20, "512MiB": 512 << 20, "2G": 2 << 30,
		"2Gi": 2 << 30, "16T": 16 << 40, "18446744073709551615": math.MaxUint64, "16777215T": 16777215 << 40,
	} {
		if got, err := units.ParseBytes(s); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{
		"", "M", "1.5G", "-1", "+1", "1 G", " 1", "1_000", "0x10", "1e9", "512MB", "1KK", "1B", "1iB", "1P", "G1", "٣",
		"18446744073709551616", "16777216T", "99999999999999999999999G",
	} {
		if got, err := units.ParseBytes(s); err == nil {
			t.Errorf("%q is %d", s, got)
		}
	}
}

func TestRate(t *testing.T) {
	for s, want := range map[string]uint64{"100M": 100 << 20, "100M/s": 100 << 20, "1G/S": 1 << 30, "0": 0} {
		var f rateFlag
		if err := f.Set(s); err != nil || uint64(f) != want {
			t.Errorf("%q: %d, %v; want %d", s, f, err, want)
		}
	}
	for _, s := range []string{"", "/s", "100M/", "100M/min", "100M/s/min", "100M/S/s"} {
		if err := new(rateFlag).Set(s); err == nil {
			t.Errorf("%q is a rate", s)
		}
	}
}

func TestFormat(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 10 << 20: "10.0 MiB", 512 << 20: "512 MiB", 1023<<20 | 1<<19: "1.00 GiB",
		math.MaxUint64: "16384 PiB",
	} {
		if got := units.Bytes(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}

// FuzzParseSize: what is accepted reads the same when it has been written.
func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"0", "512M", "2GiB", "16777215T", "18446744073709551616", "1.5G", "-1", "", "1KiBiB"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := units.ParseBytes(s)
		if err != nil {
			return
		}
		if again, err := units.ParseBytes(formatSize(n)); err != nil || again != n {
			t.Fatalf("%q is %d, written %q, which is %d, %v", s, n, formatSize(n), again, err)
		}
	})
}

func TestHintText(t *testing.T) {
	for want, r := range map[string]migrate.Result{
		"":                                      {},
		"hints: none, the guest did not answer": {HintsOff: "the guest did not answer"},
		"hints: 500 pages received, 3 late, 20 rewritten, waited 90 ms":                       {HintsReceived: 500, HintsLate: 3, HintsRewritten: 20, HintWait: 90 * time.Millisecond},
		"hints: 1 pages received, 0 late, 0 rewritten, waited 0 ms; then the driver has gone": {HintsReceived: 1, HintsOff: "the driver has gone"},
	} {
		if got := hintText(r); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
