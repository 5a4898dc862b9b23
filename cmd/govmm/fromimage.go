package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/govmm/govmm/image"
	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// imageFlags are those flags of govmm run that make the first disk of an image, once.
type imageFlags struct {
	image string
	size  sizeFlag

	disk string // the file that the disk is
}

func (f *imageFlags) register(flags *pflag.FlagSet) {
	flags.StringVar(&f.image, "image", "", "make the first disk of the image in `FILE` (qcow2 or raw, perhaps compressed): once, as NAME.raw in $XDG_DATA_HOME/govmm; later the VM goes on with that")
	flags.Var(&f.size, "size", "with --image, size of the disk, no smaller than the image's, as in 20G (0: the image's)")
}

// dataDirectory is where disks are that are made of images.
func dataDirectory() (string, error) {
	dir := os.Getenv("XDG_DATA_HOME")
	if !filepath.IsAbs(dir) {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("--image: where to put the disk: %w; set XDG_DATA_HOME", err)
		}
		dir = filepath.Join(home, ".local", "share")
	}
	return filepath.Join(dir, "govmm"), nil
}

// device is the disk, nil if there is none, of the VM with a name.
func (f *imageFlags) device(name string) (*blk.Spec, error) {
	if f.image == "" {
		if f.size != 0 {
			return nil, errors.New("--size needs --image")
		}
		return nil, nil
	}
	if name == "" {
		return nil, errors.New("--image needs a NAME, under which the disk is kept")
	}
	dir, err := dataDirectory()
	if err != nil {
		return nil, err
	}
	f.disk = filepath.Join(dir, name+".raw")
	return &blk.Spec{Config: blk.Config{Path: f.disk, Raw: true}}, nil
}

// make imports the image, unless that was done before. What the disk was made of is noted
// beside it, so that another image is not taken for it.
func (f *imageFlags) make(cmd *cobra.Command) error {
	if f.image == "" {
		return nil
	}
	from, err := filepath.Abs(f.image)
	if err != nil {
		return fmt.Errorf("--image: %w", err)
	}
	note := f.disk + ".image"
	switch disk, err := os.Stat(f.disk); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("--image: %w", err)
	default:
		was, err := os.ReadFile(note)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("--image: %w", err)
		}
		if s := strings.TrimSpace(string(was)); s != from {
			return fmt.Errorf("--image %s: the disk %s is there, and was made of %s: use --disk path=%s, or another NAME, or remove it first",
				f.image, f.disk, or(s, "something else"), f.disk)
		}
		if have := disk.Size(); int64(f.size) > have {
			return fmt.Errorf("--size: the disk %s is there, and has %s: truncate -s %d %s makes it larger while no VM uses it", f.disk, units.Bytes(uint64(have)), uint64(f.size), f.disk)
		}
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(f.disk), 0o700); err != nil {
		return fmt.Errorf("--image: %w", err)
	}
	if err := os.WriteFile(note, []byte(from+"\n"), 0o600); err != nil {
		return fmt.Errorf("--image: %w", err)
	}
	began := time.Now()
	done, err := importImage(cmd, f.image, f.disk, "auto", image.ImportOptions{Size: uint64(f.size)})
	if err != nil {
		_ = os.Remove(note) // there is no disk that it is about
		return err
	}
	_, _ = fmt.Fprintf(cmd.ErrOrStderr(), "govmm: made the disk %s (%s, of which %s were written) of %s in %s\n", f.disk,
		units.Bytes(uint64(done.Size)), units.Bytes(uint64(done.Written)), f.image, formatMS(time.Since(began)))
	return nil
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}
