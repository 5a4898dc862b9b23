package blk

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/virtio"
	"golang.org/x/sys/unix"
)

// Kind is the entry of disks in a machine's table of devices.
var Kind = virtio.Kind{
	Name:      "disk",
	Usage:     "a disk: path=FILE[,readonly][,direct][,id=ID][,queues=N][,format=raw|qcow2][,ephemeral][,bps=N][,iops=N] (`DISK`; may be given several times)",
	HereUsage: "where the guest's disk is on this host: path=FILE[,for=ID][,copy][,direct][,bps=N][,iops=N] (`DISK`; copy: to a new file; once for each disk, in their order or for the one with an ID; a guest with a disk needs it, or --allow-source-paths)",
	Parse:     parseSpec,
	ParseHere: parseHere,
	New:       func() virtio.Spec { return new(Spec) },
	NewInfo:   func() virtio.Info { return new(Info) },
	Features:  []string{featureEphemeral},
}

// featureEphemeral names disks whose content is at their source only.
const featureEphemeral = "ephemeral"

func parseSpec(words string) (virtio.Spec, error) {
	c, err := ParseConfig(words)
	if err == nil && (c.Copy || c.For != "") {
		err = fmt.Errorf("disk %q: copy and for= are for the host to which a guest moves", words)
	}
	return &Spec{Config: c}, err
}

func parseHere(words string) (virtio.Spec, error) {
	c, err := ParseConfig(words)
	return &Spec{Config: c}, err
}

// Spec is a disk in a machine's description, and what the guest has been told of
// it.
type Spec struct {
	Config
	// Size in bytes; 0: it has not been opened yet.
	Size uint64 `cbor:"size"`
}

// Kind implements [virtio.Spec].
func (s *Spec) Kind() string { return Kind.Name }

// String implements [virtio.Spec].
func (s *Spec) String() string { return "disk " + s.Path }

// DeviceName implements [virtio.Named].
func (s *Spec) DeviceName() string { return s.ID }

// ForDevice implements [virtio.Named].
func (s *Spec) ForDevice() string { return s.For }

// Words implements [virtio.Worded].
func (s *Spec) Words() string {
	c := s.Config
	c.Copy = false
	return c.String()
}

// Validate implements [virtio.Spec].
func (s *Spec) Validate() error {
	if err := s.Config.Validate(); err != nil {
		return fmt.Errorf("disk %s: %w", s.Path, err)
	}
	return nil
}

// FeaturesInUse implements [virtio.Featured].
func (s *Spec) FeaturesInUse() []string {
	if s.Ephemeral {
		return []string{featureEphemeral}
	}
	return nil
}

// Stays implements [virtio.Stayer].
func (s *Spec) Stays() error {
	if s.Ephemeral {
		return fmt.Errorf("disk %s is ephemeral: what the guest has written to it is in this process only", s.Path)
	}
	return nil
}

// Uses implements [virtio.Exclusive].
func (s *Spec) Uses() []string { return []string{s.String()} }

// MakeAbsolute implements [virtio.Pathed].
func (s *Spec) MakeAbsolute() (err error) {
	if s.Path, err = virtio.Absolute(s.Path); err != nil {
		return fmt.Errorf("disk %s: %w", s.Path, err)
	}
	return nil
}

// Move implements [virtio.Mover]: the path and the way to it are the host's, all
// else the guest knows.
func (s *Spec) Move(here virtio.Spec) error {
	if err := s.Stays(); err != nil {
		return err
	}
	if here == nil {
		if !filepath.IsAbs(s.Path) {
			return fmt.Errorf("disk %s: expected an absolute path from the source, found a relative one; say where the disk is on this host: --disk path=FILE", s.Path)
		}
		return nil
	}
	h := here.(*Spec)
	errs := []error{h.MakeAbsolute()}
	for _, differs := range []struct {
		what string
		is   bool
	}{
		{"readonly", h.ReadOnly && !s.ReadOnly},
		{"id", h.ID != "" && h.ID != s.ID},
		{"ephemeral", h.Ephemeral},
		{"queues", h.Queues != 0 && h.Queues != s.queues()},
	} {
		if differs.is {
			errs = append(errs, fmt.Errorf("disk %s: %s is the guest's and cannot change when it moves (at the source the disk is %s)",
				h.Path, differs.what, s.Config))
		}
	}
	s.Path, s.Direct, s.Limit, s.Copy, s.Copied = h.Path, h.Direct, h.Limit, h.Copy, h.Copied
	return errors.Join(errs...)
}

// Later implements [virtio.Latecomer]: to be compared with another host's, an image is
// opened for reading once more, and a block device that is taken back is claimed by
// opening it.
func (s *Spec) Later(arrives bool) virtio.Later {
	if s.Ephemeral {
		return virtio.Later{}
	}
	if s.Copy {
		dir := []string{filepath.Dir(s.Path)}
		return virtio.Later{Write: dir, Replace: dir}
	}
	var st unix.Stat_t
	device := unix.Stat(s.Path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK
	if !s.ReadOnly && (arrives || device) {
		return virtio.Later{Write: []string{s.Path}}
	}
	return virtio.Later{Read: []string{s.Path}}
}

// Open implements [virtio.Spec]. The image is not locked yet.
func (s *Spec) Open(log *slog.Logger) (virtio.Backend, error) {
	c := s.Config
	if c.Copy {
		if s.Size == 0 {
			return nil, fmt.Errorf("disk %s: a new disk cannot be copied", s.Path)
		}
		d, err := OpenCopy(c, s.Size, log)
		if err != nil {
			return nil, err
		}
		return &backend{d, s}, nil
	}
	// What a guest has written says nothing about the image's format.
	c.Raw = c.Raw || s.Size != 0
	d, err := Open(c, log)
	if err != nil {
		return nil, err
	}
	if s.Size != 0 && d.Size() != s.Size {
		err := fmt.Errorf("disk %s: expected %d bytes as at the source, found %d", s.Path, s.Size, d.Size())
		return nil, errors.Join(err, d.Close())
	}
	if err := d.image.checkMoved(); err != nil && s.Size == 0 && !c.Force && !c.ReadOnly {
		return nil, errors.Join(fmt.Errorf("disk %s: %w", s.Path, err), d.Close())
	}
	s.Size = d.Size()
	return &backend{d, s}, nil
}

// backend is a disk as its machine's next life uses it again.
type backend struct {
	*Device
	spec *Spec
}

func (b *backend) Attach(virtio.Guest) (virtio.Device, error) { return b.Device, nil }

// Unlock implements [virtio.Locker]. When ctx ends before storage has answered, the
// image stays locked.
func (b *backend) Unlock(ctx context.Context) error {
	synced := make(chan error, 1)
	go func() { synced <- b.Sync() }()
	select {
	case err := <-synced:
		if err != nil {
			return err
		}
		return b.release()
	case <-ctx.Done():
		return fmt.Errorf("disk %s: flush: %w", b.spec.Path, context.Cause(ctx))
	}
}

// Info describes a disk. The counters are of this process.
type Info struct {
	Path         string `json:"path"`
	Size         uint64 `json:"size"` // bytes
	ReadOnly     bool   `json:"readonly"`
	Direct       bool   `json:"direct"`
	Format       string `json:"format,omitempty"`    // "": raw
	Ephemeral    bool   `json:"ephemeral,omitempty"` // what the guest writes is gone at its end
	ID           string `json:"id,omitempty"`
	Limit        string `json:"limit,omitempty"` // of this host, for people
	Queues       int    `json:"queues"`
	ReadBytes    uint64 `json:"read_bytes"`
	WrittenBytes uint64 `json:"written_bytes"`
	Errors       uint64 `json:"errors"` // of the host's storage
	Stats        Stats  `json:"-"`      // all that is counted
}

// Info implements [virtio.Backend].
func (b *backend) Info() virtio.Info {
	s, c := b.Stats(), b.spec
	return &Info{Path: c.Path, Size: c.Size, ReadOnly: c.ReadOnly, Direct: c.Direct, Format: string(c.Format), Ephemeral: c.Ephemeral, ID: c.ID, Limit: c.Limit.Describe(), Queues: c.queues(),
		ReadBytes: s.ReadBytes, WrittenBytes: s.WrittenBytes, Errors: s.Errors, Stats: s}
}

// Lines implements [virtio.Info].
func (i *Info) Lines() []string {
	what := i.Path + ", " + units.Bytes(i.Size)
	for _, o := range []struct {
		is   bool
		text string
	}{{i.ReadOnly, "read-only"}, {i.Direct, "direct"}, {i.Format != "", i.Format}, {i.Ephemeral, "ephemeral"}, {i.ID != "", "id " + i.ID}, {i.Queues > 1, fmt.Sprintf("%d queues", i.Queues)}, {i.Limit != "", i.Limit}} {
		if o.is {
			what += ", " + o.text
		}
	}
	return []string{what, fmt.Sprintf("read %s, wrote %s, %d errors", units.Bytes(i.ReadBytes), units.Bytes(i.WrittenBytes), i.Errors)}
}
