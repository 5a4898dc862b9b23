package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/govmm/govmm/image"
	"github.com/govmm/govmm/internal/units"
	"github.com/spf13/cobra"
)

func newImage() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Make disks of images (qcow2, raw), and describe images",
		Long: `Make disks of images (qcow2, raw), and describe images. An image may be compressed
with gzip, xz or zstd.

  govmm image import debian-12-genericcloud-amd64.qcow2 web.raw --size 20G
  govmm run web --disk path=web.raw

A disk is a raw file with holes: govmm reads qcow2 and never writes it.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef(cmd, "expected import or info, found %.80q; see govmm image --help", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usagef(cmd, "expected import or info; see govmm image --help")
		},
	}
	cmd.AddCommand(newImageImport(), newImageInfo())
	return cmd
}

// formatHelp says how the format of a named file is found.
const formatHelp = "`FORMAT` of the image: raw or qcow2 (none: as its name ends, .raw or .qcow2, or else as it begins; then it may have no backing file)"

func newImageImport() *cobra.Command {
	var o image.ImportOptions
	var size sizeFlag
	var format, progress string
	cmd := &cobra.Command{
		Use:   "import FILE DISK",
		Short: "Make a raw disk of an image",
		Long: `Make a raw disk, the file DISK, of the image in FILE: qcow2 or raw, or one of these
compressed with gzip, xz or zstd. Where the image has zeros the disk has holes.

DISK has its name only when it is complete and on the storage; an import that
fails or is interrupted leaves nothing. Backing files of a qcow2 image are files
in the same directory, by a plain name.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 || args[0] == "" || args[1] == "" {
				return usagef(cmd, "expected FILE and DISK; see %s --help", cmd.CommandPath())
			}
			if err := checkFormat(format); err != nil {
				return usagef(cmd, "%v", err)
			}
			if progress != "auto" && progress != "none" {
				return usagef(cmd, "--progress %q: expected auto or none", progress)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Format, o.Size = image.Format(format), uint64(size)
			started := time.Now()
			done, err := importImage(cmd, args[0], args[1], progress, o)
			if err != nil {
				return fmt.Errorf("image %w", err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %s, of which %s were written, from %s (%v) in %s\n", args[1], units.Bytes(uint64(done.Size)),
				units.Bytes(uint64(done.Written)), args[0], done.Kind, formatMS(time.Since(started)))
			return err
		},
	}
	cmd.Flags().Var(&size, "size", "size of the disk, no smaller than the image's, as in 20G (0: the image's)")
	cmd.Flags().BoolVar(&o.Force, "force", false, "replace a file that is there")
	cmd.Flags().StringVar(&format, "format", "", formatHelp)
	cmd.Flags().StringVar(&progress, "progress", "auto", "`WHEN` to draw a progress bar: auto (on a terminal) or none")
	return cmd
}

func checkFormat(format string) error {
	if format == "" {
		return nil
	}
	if _, err := image.ParseFormat(format); err != nil {
		return fmt.Errorf("--%w", err)
	}
	return nil
}

// importImage imports, and draws how far it is. A signal ends it, and leaves nothing.
func importImage(cmd *cobra.Command, from, to, progress string, o image.ImportOptions) (image.Imported, error) {
	ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	line := newProgressLine(cmd.ErrOrStderr(), progress)
	if line.out != nil {
		o.Progress = func(p image.Progress) { line.text(bar(p)) }
	}
	done, err := image.Import(ctx, from, to, o)
	line.clear()
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		err = fmt.Errorf("import %s to %s: interrupted; nothing is left of it", from, to)
	}
	return done, err
}

// bar is a progress bar in ASCII.
func bar(p image.Progress) string {
	const width = 30
	full := int(float64(p.Done) / float64(p.Total) * width)
	return fmt.Sprintf("[%s%s] %3.0f%%  %s of %s, %s written", strings.Repeat("#", full), strings.Repeat("-", width-full),
		float64(p.Done)/float64(p.Total)*100, units.Bytes(uint64(p.Done)), units.Bytes(uint64(p.Total)), units.Bytes(uint64(p.Written)))
}

func newImageInfo() *cobra.Command {
	var format string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "info FILE",
		Short: "Describe an image",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 || args[0] == "" {
				return usagef(cmd, "expected one FILE; see %s --help", cmd.CommandPath())
			}
			if err := checkFormat(format); err != nil {
				return usagef(cmd, "%v", err)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			info, disk, err := image.Inspect(args[0], image.Format(format))
			if err != nil {
				return fmt.Errorf("image info: %w", err)
			}
			if disk != nil { // nil: it is compressed as a whole
				defer disk.Close()
			}
			boot := entriesOf(cmd.Context(), disk)
			if asJSON {
				return printJSON(cmd.OutOrStdout(), struct {
					*image.Info
					bootable
				}{info, boot})
			}
			return printImageInfo(cmd.OutOrStdout(), info, boot)
		},
	}
	cmd.Flags().StringVar(&format, "format", "", formatHelp)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return cmd
}

func printImageInfo(out io.Writer, i *image.Info, boot bootable) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(key, format string, args ...any) { _, _ = fmt.Fprintf(w, key+"\t"+format+"\n", args...) }
	row("image", "%s", i.Path)
	row("format", "%s", image.Kind{Format: i.Format, Compression: i.Compression})
	if i.Compression == "" {
		row("disk", "%s (%d bytes)", units.Bytes(uint64(i.Size)), i.Size)
	} else {
		row("disk", "unknown until it is decompressed")
	}
	row("file", "%s, of which %s are stored", units.Bytes(uint64(i.FileSize)), units.Bytes(uint64(i.OnDisk)))
	if q := i.Qcow2; q != nil {
		what := []string{"version " + strconv.Itoa(int(q.Version)), "clusters of " + units.Bytes(uint64(q.ClusterSize)), q.Compression + " where compressed"}
		for _, o := range []struct {
			is   bool
			text string
		}{{q.Subclusters, "subclusters"}, {q.LazyRefcounts, "lazy reference counts"}, {q.Dirty, "not closed by its writer"},
			{q.Snapshots > 0, fmt.Sprintf("%d internal snapshots, which are not read", q.Snapshots)}} {
			if o.is {
				what = append(what, o.text)
			}
		}
		row("qcow2", "%s", strings.Join(what, ", "))
	}
	key := "backing"
	for _, l := range i.Below {
		row(key, "%q, %s, %s", l.Name, l.Format, units.Bytes(uint64(l.Size)))
		key = ""
	}
	key = "boots"
	for _, l := range boot.lines() {
		row(key, "%s", l)
		key = ""
	}
	return w.Flush()
}
