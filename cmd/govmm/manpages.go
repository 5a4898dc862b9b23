//go:build manpages

package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
	"github.com/spf13/pflag"
)

// In a build with this tag, govmm DIR VERSION DATE writes a manual page of each command into a
// directory, and does nothing else. The package has the pages (packaging/deb.sh); the govmm that
// is shipped has neither them nor what makes them.
func init() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "manual pages: expected DIR VERSION YYYY-MM-DD")
		os.Exit(exitUsage)
	}
	if err := writeManPages(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "manual pages:", err)
		os.Exit(exitFailed)
	}
	os.Exit(exitDone)
}

func writeManPages(dir, version, day string) error {
	date, err := time.Parse(time.DateOnly, day)
	if err != nil {
		return err
	}
	root := newRoot(nil)
	root.Version = ""
	root.DisableAutoGenTag = true
	preformat(root)
	return doc.GenManTree(root, &doc.GenManHeader{Section: "1", Source: "govmm " + version, Manual: "Commands of govmm", Date: &date}, dir)
}

// preformat makes tables and examples of the help, which are indented there, code: the pages are
// made of Markdown.
func preformat(cmd *cobra.Command) {
	lines := strings.Split(cmd.Long, "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, "  ") {
			lines[i] = "  " + l
		}
	}
	cmd.Long = strings.Join(lines, "\n")
	cmd.Flags().VisitAll(func(f *pflag.Flag) { f.Usage = strings.ReplaceAll(f.Usage, "`", "") })
	for _, c := range cmd.Commands() {
		preformat(c)
	}
}
