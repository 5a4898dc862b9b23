package blk

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/govmm/govmm/cloudinit"
	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/virtio"
	"golang.org/x/sys/unix"
)

// SeedKind is the entry of seeds in a machine's table of devices: a small disk that is read
// only, and whose content is part of the machine's description. It travels with the guest
// and names nothing of a host. A host that does not know the kind refuses the guest by its name.
var SeedKind = virtio.Kind{
	Name:    "seed",
	Max:     1,
	New:     func() virtio.Spec { return new(SeedSpec) },
	NewInfo: func() virtio.Info { return new(SeedInfo) },
}

// MaxSeed is the largest size of a seed in bytes.
const MaxSeed = 4 << 20

// seedID is what a guest reads as the serial number of a seed.
const seedID = "cloud-init"

// SeedSpec is a seed in a machine's description.
type SeedSpec struct {
	// Content is the bytes of the disk, whole sectors: see package cloudinit.
	Content []byte `cbor:"content"`
}

// Kind implements [virtio.Spec].
func (s *SeedSpec) Kind() string { return SeedKind.Name }

// String implements [virtio.Spec].
func (s *SeedSpec) String() string { return "seed" }

// Validate implements [virtio.Spec].
func (s *SeedSpec) Validate() error {
	if n := len(s.Content); n == 0 || n > MaxSeed || n%SectorSize != 0 {
		return fmt.Errorf("seed of %d bytes: must be whole sectors, at least one and at most %d bytes", n, MaxSeed)
	}
	return nil
}

// Renew implements [virtio.Renewer]: cloud-init takes a copy for another instance. A content
// that is not of govmm stays.
func (s *SeedSpec) Renew(virtio.Spec) {
	if content, err := cloudinit.Renew(s.Content); err == nil && len(content) == len(s.Content) {
		s.Content = content
	}
}

// Open implements [virtio.Spec]. The content is in a file in memory, which nobody can write.
func (s *SeedSpec) Open(log *slog.Logger) (virtio.Backend, error) {
	im, err := openMemory("seed", s.Content)
	if err != nil {
		return nil, fmt.Errorf("seed: %w", err)
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	c := Config{Path: "seed", ReadOnly: true, ID: seedID}
	return &seedBackend{&Device{config: c, image: im, log: log, topology: im.topology, writeBack: true}}, nil
}

// openMemory makes a file in memory with a content that stays as it is.
func openMemory(name string, content []byte) (*image, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	im := &image{path: name, fd: fd, readOnly: true, offsetAlign: 1, memAlign: 1, fdatasync: unix.Fdatasync, sectors: uint64(len(content) / SectorSize)}
	im.lock.claim = -1
	for done := 0; done < len(content) && err == nil; {
		var n int
		n, err = retry(func() (int, error) { return unix.Pwrite(fd, content[done:], int64(done)) })
		done += n
	}
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("fill a file in memory: %w", err), im.close())
	}
	im.topology = im.findTopology(maxBlock)
	return im, nil
}

// seedBackend is a seed's device, as its machine's next life uses it again.
type seedBackend struct{ d *Device }

// Attach implements [virtio.Backend].
func (b *seedBackend) Attach(virtio.Guest) (virtio.Device, error) { return b.d, nil }

// Close implements [virtio.Backend].
func (b *seedBackend) Close() error { return b.d.Close() }

// SeedInfo describes a seed. The counters are of this process.
type SeedInfo struct {
	Size      uint64 `json:"size"` // bytes
	ReadBytes uint64 `json:"read_bytes"`
}

// Info implements [virtio.Backend].
func (b *seedBackend) Info() virtio.Info {
	return &SeedInfo{Size: b.d.Size(), ReadBytes: b.d.Stats().ReadBytes}
}

// Lines implements [virtio.Info].
func (i *SeedInfo) Lines() []string {
	return []string{fmt.Sprintf("for cloud-init, %s, read %s", units.Bytes(i.Size), units.Bytes(i.ReadBytes))}
}
