package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/report/page"
	"github.com/govmm/govmm/vmm/api"
	"github.com/spf13/cobra"
)

// reportFlag is --report of govmm migrate: a file for a page about the migration.
type reportFlag struct {
	path  string
	began time.Time
	name  string // of the VM
}

// begin notes what is not known any more when the migration has ended.
func (f *reportFlag) begin(ctx context.Context, c *api.Client) {
	if f.path != "" {
		f.began = time.Now()
		info, _ := c.Info(ctx) // a page without the name is better than none
		f.name = info.Name
	}
}

// write writes the page, if one is wanted and there is something to tell.
func (f *reportFlag) write(to string, res migrate.Result) error {
	if f.path == "" || res.Status == "" {
		return nil
	}
	return writeReport(f.path, page.Record{Source: f.name, Destination: to, Began: f.began, Result: res})
}

// writeReport makes the file of a page: whole, or not at all.
func writeReport(path string, r page.Record) error {
	var b bytes.Buffer
	if err := page.Write(&b, r); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	if st, err := os.Stat(path); err == nil && !st.Mode().IsRegular() { // /dev/stdout
		return os.WriteFile(path, b.Bytes(), 0o644)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".report-*")
	if err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	_, err = f.Write(b.Bytes())
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Chmod(f.Name(), 0o644)
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("write the report: %w", err)
	}
	return nil
}

func newReport() *cobra.Command {
	return &cobra.Command{
		Use:   "report ID FILE",
		Short: "Write a page with plots about a migration that has ended",
		Long: `Write a page with plots about a migration that has ended: FILE is HTML, in one piece, or
/dev/stdout. govmm migrations lists the IDs.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usagef(cmd, "expected an ID and a FILE, found %d arguments; see %s --help", len(args), cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			all, err := allRecords(cmd.Context(), cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			for _, r := range all {
				switch {
				case r.ID != args[0]:
				case r.Result == nil:
					return fmt.Errorf("report: the migration %s is under way", r.ID)
				default:
					return writeReport(args[1], page.Record{ID: r.ID, Source: r.VM, Destination: r.Address, Began: r.Started, Result: *r.Result})
				}
			}
			return fmt.Errorf("report: there is no migration with the id %q; govmm migrations lists them", args[0])
		},
	}
}
