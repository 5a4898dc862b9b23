package machine

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
)

// Disks lists the guest's disks, see [migrate.DiskSource].
func (s *source) Disks() (list []migrate.Disk) {
	for _, b := range s.devices.backends.all {
		if d, ok := b.(migrate.Disk); ok {
			list = append(list, d)
		}
	}
	return list
}

// diskCopy is a disk that is copied to this host.
type diskCopy struct {
	diskFile
	number int
}

// diskFile is what the backend of a disk has for that.
type diskFile interface {
	migrate.Disk
	Reserve(off, n uint64) error
	Write(p []byte, off uint64) error
	Zero(off, n uint64) error
	Sync() error
	IsCopy() bool
}

// Number implements [migrate.DiskCopy].
func (d diskCopy) Number() int { return d.number }

// DiskCopies lists the disks that are copied here, see [migrate.DiskTarget].
func (t *Target) DiskCopies() (list []migrate.DiskCopy) {
	n := 0
	for _, b := range t.devices.backends.all {
		if _, ok := b.(migrate.Disk); !ok {
			continue
		}
		if d, ok := b.(diskFile); ok && d.IsCopy() {
			list = append(list, diskCopy{d, n})
		}
		n++
	}
	return list
}

// disksIn gives each disk of a guest that comes a file in dir, with the name that it had at
// the source as far as that is a plain name, and no disk's twice.
func disksIn(dir string, devices []virtio.Spec) (here []virtio.Spec, err error) {
	if !filepath.IsAbs(dir) {
		return nil, kind.Hidden(fmt.Errorf("directory for disks %s: it must be absolute", dir), "this host cannot keep copies of disks")
	}
	taken := map[string]bool{}
	for _, d := range devices {
		disk, ok := d.(*blk.Spec)
		if !ok {
			continue
		}
		base := plainName(filepath.Base(disk.Path))
		name := base
		for n := 2; taken[name]; n++ {
			name = fmt.Sprintf("%d-%s", n, base)
		}
		taken[name] = true
		here = append(here, &blk.Spec{Config: blk.Config{Path: filepath.Join(dir, name), Copy: true}})
	}
	return here, nil
}

// plainName is what is left of a name that a peer has chosen: letters, digits, and signs
// that no shell and no file system reads as something else.
func plainName(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '.', r == '_', r == '-':
			return r
		}
		return '_'
	}, s)
	s = strings.TrimLeft(s, ".-")
	if s = s[:min(len(s), maxDiskName)]; s == "" {
		return "disk"
	}
	return s
}

// maxDiskName leaves room for what is put before a name.
const maxDiskName = 128
