package virtio

import (
	"slices"
	"testing"
)

func TestSplitOption(t *testing.T) {
	for option, want := range map[string][]string{
		"":               {""},
		"a":              {"a"},
		"path=a,b=c":     {"path=a", "b=c"},
		"path=a,,b,c":    {"path=a,b", "c"},
		"a,,,b":          {"a,", "b"},
		",a,":            {"", "a", ""},
		"a,,":            {"a,"},
		"a,,,,b,ro=\x00": {"a,,b", "ro=\x00"},
	} {
		if got := SplitOption(option); !slices.Equal(got, want) {
			t.Errorf("%q: %q, not %q", option, got, want)
		}
	}
}
