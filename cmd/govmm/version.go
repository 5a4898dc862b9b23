package main

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
)

// release is the version of this source: the first one in CHANGELOG.md. In a build
// by make from a tagged commit, or one after it, the tag takes its place.
const release = "0.1.0"

// gitVersion is set by the Makefile (-ldflags -X) to what git describe prints:
// v0.1.0, v0.1.0-3-g0123456 or, where there is no tag, a commit.
var gitVersion string

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "govmm "+version())
			return err
		},
	}
}

// version names the build, as "v0.1.0+0123456 go1.26.0 linux/amd64".
func version() string {
	v := gitVersion
	if v == "" {
		v = builtCommit()
	}
	if !strings.HasPrefix(v, "v") { // there is no tag
		v = strings.TrimSuffix("v"+release+"+"+v, "+")
	}
	return fmt.Sprintf("%s %s %s/%s", v, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

// builtCommit is the commit that the Go tool noted in a build without the
// Makefile, or "".
func builtCommit() string {
	info, _ := debug.ReadBuildInfo()
	if info == nil {
		return ""
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return s.Value[:12]
		}
	}
	return ""
}
