package machine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm/memory"
	"golang.org/x/sys/unix"
)

// Heirloom is what a machine leaves, beside its spec and its state, to a process of the same
// host that goes on with its guest. The files are duplicates: whoever has the heirloom
// closes them.
type Heirloom struct {
	Memory  *os.File     // nil: the memory is no file, and its pages are sent
	Devices [][]*os.File // of each device; nil: it is opened anew
}

// Close closes all files.
func (h *Heirloom) Close() {
	if h.Memory != nil {
		_ = h.Memory.Close()
	}
	for _, files := range h.Devices {
		virtio.CloseFiles(files)
	}
	*h = Heirloom{}
}

// Heirloom duplicates what the machine leaves.
func (m *Machine) Heirloom() (h Heirloom, err error) {
	defer func() {
		if err != nil {
			h.Close()
		}
	}()
	if h.Memory, err = m.mem.File(); err != nil {
		return h, err
	}
	h.Devices = make([][]*os.File, len(m.devices.shown))
	for i, b := range m.devices.shown {
		one, ok := inherits(m.spec.Devices[i], b)
		if !ok {
			continue
		}
		fds, err := one.Descriptors()
		if err != nil {
			return h, err
		}
		for _, fd := range fds {
			f, err := duplicate(fd, m.spec.Devices[i].String())
			if err != nil {
				return h, err
			}
			h.Devices[i] = append(h.Devices[i], f)
		}
	}
	return h, nil
}

// inherits reports whether another process goes on with the descriptors of a device.
func inherits(spec virtio.Spec, b virtio.Backend) (virtio.Inheritable, bool) {
	_, heir := spec.(virtio.Heir)
	one, ok := b.(virtio.Inheritable)
	return one, ok && heir
}

// YieldToHeir is YieldForHandoff for a process of the same host, which has the descriptors
// of the Heirloom: only what it cannot get by them is given up. Nothing is flushed, since
// both processes see what the kernel has.
func (s *source) YieldToHeir(ctx context.Context) error {
	var errs []error
	for i, b := range s.devices.shown {
		l, ok := b.(virtio.Locker)
		if _, goes := inherits(s.spec.Devices[i], b); ok && !goes {
			errs = append(errs, l.Unlock(ctx))
		}
	}
	return errors.Join(errs...)
}

// Populations is for [Target.Inherited]: nil, unless the memory is of huge pages.
func (m *Machine) Populations() (mempage.Bitmap, error) { return m.mem.Populations() }

// BuildHeir is [Builder.Build] with what a process of this host leaves. It takes the heirloom
// over.
func (b *Builder) BuildHeir(_ context.Context, config []byte, h Heirloom) (*Target, error) {
	defer h.Close()
	return b.build(config, &h)
}

// open opens the devices' backends, from what was left where that is possible.
func (h *Heirloom) open(devices []virtio.Spec) (func(int, virtio.Spec, *slog.Logger) (virtio.Backend, error), error) {
	if h == nil {
		return nil, nil
	}
	if len(h.Devices) != len(devices) {
		return nil, kind.Told(fmt.Errorf("descriptors of %d devices, expected those of %d", len(h.Devices), len(devices)))
	}
	return func(i int, d virtio.Spec, log *slog.Logger) (virtio.Backend, error) {
		files := h.Devices[i]
		heir, ok := d.(virtio.Heir)
		if !ok || files == nil {
			return d.Open(log)
		}
		h.Devices[i] = nil
		return heir.Inherit(files, log)
	}, nil
}

// memory returns the memory that was left; nil: there is none.
func (h *Heirloom) memory(spec *Spec) (*memory.Memory, error) {
	if h == nil || h.Memory == nil {
		return nil, nil
	}
	file := h.Memory
	h.Memory = nil
	return memory.Adopt(spec.Memory, spec.Backing, file)
}

// Inherited tells a target with memory of another process what of it is populated, see
// [memory.Memory.Inherited].
func (t *Target) Inherited(populated mempage.Bitmap) error {
	if populated == nil {
		return nil
	}
	return t.mem.Inherited(populated)
}

// StartHeir is Start for a guest whose process on this host is another one until claim has
// returned nil: claim takes the right to run, as the last thing before the vCPUs have it.
func (t *Target) StartHeir(ctx context.Context, paused bool, claim func() error) error {
	if err := errors.Join(t.Acquire(), t.awaitTimer()); err != nil {
		return err
	}
	if err := claim(); err != nil {
		return err
	}
	return t.Start(ctx, paused)
}

func duplicate(fd uintptr, name string) (*os.File, error) {
	n, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: duplicate its descriptor: %w", name, err)
	}
	return os.NewFile(uintptr(n), name), nil
}

// KVMFile returns a descriptor of /dev/kvm, for another process that calls [AdoptKVM]. The
// caller closes it.
func KVMFile() (*os.File, error) {
	sys, err := kvm.Shared()
	if err != nil {
		return nil, err
	}
	return sys.File()
}

// AdoptKVM makes machines of this process use a /dev/kvm that another one has opened. It
// takes the file over, also if it fails.
func AdoptKVM(f *os.File) error { return kvm.Adopt(f) }

// SharesMemory reports whether another process of this host can go on in the machine's
// memory: it is a file.
func (m *Machine) SharesMemory() bool { return m.mem.Shareable() }
