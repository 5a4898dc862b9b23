package machine

import (
	"context"
	"errors"
	"fmt"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm/diskboot"
)

// featureDiskBoot is that of a spec with [DiskBoot].
const featureDiskBoot = "disk-boot"

const maxBootEntry = 256 // bytes

// DiskBoot says that a machine boots what is on its first disk. It is read out of the disk
// at each start and reset, on the host where the guest is by then, and does not travel.
type DiskBoot struct {
	// Entry is the id or title of the entry that boots; "": the one that the disk's boot
	// loader would choose.
	Entry string `cbor:"entry"`
}

// KernelReader reads the kernel out of a disk, a [*diskboot.Reader] for example.
type KernelReader interface {
	Read(ctx context.Context, d diskboot.Disk, entry string) (*diskboot.Image, error)
}

// validateBoot reports what a spec that boots from its disk must not have.
func (s *Spec) validateBoot() (errs []error) {
	if len(s.Kernel) > 0 || len(s.Initrd) > 0 {
		errs = append(errs, errors.New("a kernel in a file and one on the disk: expected one of them"))
	}
	if n := len(s.Boot.Entry); n > maxBootEntry {
		errs = append(errs, fmt.Errorf("boot entry of %d bytes: must be at most %d", n, maxBootEntry))
	}
	return errs
}

// bootDisk is a disk as its kernel is read from it.
type bootDisk struct{ virtio.Readable }

func (d bootDisk) Size() int64 { return int64(d.Readable.Size()) }

// readKernel reads what the first disk boots. The disk is locked, and nobody writes it.
func (m *Machine) readKernel() (*diskboot.Image, error) {
	const advice = "; --kernel FILE boots another one, as would a firmware that starts by PVH, such as rust-hypervisor-firmware"
	if m.spec.Reader == nil {
		return nil, errors.New("the guest boots from its disk, and there is no process that reads it")
	}
	for i, b := range m.devices.backends.all {
		d, ok := b.(virtio.Readable)
		if !ok {
			continue
		}
		if err := m.Acquire(); err != nil {
			return nil, err
		}
		image, err := m.spec.Reader.Read(context.Background(), bootDisk{d}, m.spec.Boot.Entry)
		if err != nil {
			if errors.Is(err, diskboot.ErrNoKernel) {
				err = fmt.Errorf("%w%s", err, advice)
			}
			return nil, fmt.Errorf("%s: boot from it: %w", m.devices.backends.names[i], err)
		}
		e := image.Entry
		what := fmt.Sprintf("%s, of %s", e.Kernel, m.devices.backends.names[i])
		if e.Title != "" {
			what = e.Title + " (" + what + ")"
		}
		m.booted.Store(&what)
		m.log.Info("boots "+what, "from", e.Source)
		return image, nil
	}
	return nil, errors.New("the guest boots from its disk, and has none" + advice)
}

// KernelKind says for people what the guest boots.
func (m *Machine) KernelKind() string {
	if what := m.booted.Load(); what != nil {
		return *what
	}
	return m.spec.KernelKind()
}
