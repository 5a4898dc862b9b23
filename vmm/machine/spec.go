package machine

import (
	"bytes"
	"errors"
	"fmt"
	"unicode"
	"unicode/utf8"

	"github.com/govmm/govmm/guest"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm/cpu"
	"github.com/govmm/govmm/vmm/loader"
	"github.com/govmm/govmm/vmm/memory"
)

// SpecVersion is the version of [Spec]. A destination takes its own only.
const SpecVersion = 1

// Bounds of a [Spec].
const (
	MaxCPUs   = loader.MaxCPUs
	MaxName   = 64        // bytes
	MaxKernel = 128 << 20 // bytes
	MaxInitrd = 256 << 20 // bytes
	maxCPUID  = 256       // KVM_MAX_CPUID_ENTRIES
	maxNeeds  = 256
)

// Spec is all that it takes to make a machine, on this host or another: a machine
// is made from it at boot, again at each reset, and it is what a migration sends
// first. The kernel travels too, so that a guest that was migrated can reset itself
// where its kernel's file does not exist.
//
// A field that is added after v0.1.0 is tagged omitzero, and is listed in Features
// while it is in use.
type Spec struct {
	Version uint32 `cbor:"version"`
	// Features name what came after v0.1.0 and is in use, in this spec and in the
	// state that follows it. A host that does not know one refuses the guest by
	// that name. They are "KIND/FEATURE" for a device's (see [virtio.Featured]).
	Features []string       `cbor:"features"`
	Name     string         `cbor:"name"`
	CPUs     int            `cbor:"cpus"`
	Memory   uint64         `cbor:"memory"` // bytes
	Backing  memory.Backing `cbor:"backing"`
	Cmdline  string         `cbor:"cmdline"`
	Kernel   []byte         `cbor:"kernel"` // an ELF file with a PVH entry, or a bzImage
	Initrd   []byte         `cbor:"initrd"` // the initial RAM disk; empty: none
	// Boot, if it is not nil, says that Kernel and Initrd are on the first disk, and so is
	// Cmdline, if it is empty.
	Boot *DiskBoot `cbor:"boot,omitzero"`
	// NoUnpack lets a bzImage unpack itself in the guest.
	NoUnpack bool `cbor:"no_unpack"`
	// CPUID is the guest's processor, without what differs between its vCPUs.
	CPUID []kvm.CPUIDEntry `cbor:"cpuid"`
	// TSCKHz is the frequency of the guest's TSC; 0: the host's.
	TSCKHz uint64 `cbor:"tsc_khz"`
	// Needs are the KVM capabilities without which the state of this machine
	// cannot be loaded.
	Needs []uint32 `cbor:"needs"`
	// Devices are the virtio devices, in the order of their slots on the PCI bus:
	// that of the table of kinds. They are encoded as [deviceSpec].
	Devices []virtio.Spec `cbor:"-"`

	// What follows is this host's choice and does not travel.

	// Kinds are kinds of devices beside those of [Kinds].
	Kinds []virtio.Kind `cbor:"-"`
	// Tracking is how the guest's writes are tracked; "": [TrackAuto].
	Tracking DirtyTracking `cbor:"-"`
	// Overcommit allows more memory than is available on this host, see [memory.Admit].
	Overcommit bool `cbor:"-"`
	// Reader reads the kernel out of a disk; it is needed for Boot.
	Reader KernelReader `cbor:"-"`
	// received says that the kernel comes from a peer. Such a bzImage is not unpacked
	// on the host: the source has sent it unpacked if it could.
	received bool
	// saved says that the machine is that of a snapshot.
	saved bool
	// inherited says that the memory is there: a process of this host leaves it.
	inherited bool
}

// kernel returns the kernel, unpacked if the user of this host gave it and wants that.
// No decompressor runs on the kernel of a peer, or of a disk, which is the guest's: a
// bzImage unpacks itself in the guest.
func (s *Spec) kernel() ([]byte, error) {
	if s.NoUnpack || s.received || s.Boot != nil {
		return s.Kernel, nil
	}
	return loader.Unpack(s.Kernel, s.Memory)
}

// kinds is the whole table of kinds.
func (s *Spec) kinds() []virtio.Kind { return append(Kinds(), s.Kinds...) }

// Complete returns the spec of a machine that starts on this host, with what the
// host decides: the version, the processor (model is one of [cpu.Models], "" is
// [cpu.Host]), and the order of the devices. It reports everything for which this
// host cannot make it.
func (s Spec) Complete(model string) (_ Spec, err error) {
	s.Version = SpecVersion
	s.Devices = sorted(s.Devices, s.kinds())
	if err := MakeAbsolute(s.Devices); err != nil {
		return s, err
	}
	sys, err := kvm.Shared()
	if err != nil {
		return s, err
	}
	if s.CPUID, err = cpu.Guest(sys, model, s.Memory); err != nil {
		return s, err
	}
	if err := s.Validate(); err != nil {
		return s, err
	}
	return s, memory.Admit(s.Memory, s.Backing, s.Overcommit)
}

// Validate reports everything about the spec that no host could make a machine
// from.
func (s *Spec) Validate() error {
	if s.Version != SpecVersion {
		// The rest may mean something else in another version.
		return fmt.Errorf("machine description: expected version %d, found %d", SpecVersion, s.Version)
	}
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if err := ValidName(s.Name); err != nil {
		errs = append(errs, err)
	}
	if s.CPUs < 1 || s.CPUs > MaxCPUs {
		bad("%d vCPUs: must be between 1 and %d", s.CPUs, MaxCPUs)
	}
	if s.Memory < memory.MinSize || s.Memory > memory.MaxSize || s.Memory%mempage.Size != 0 {
		bad("memory of %d bytes: must be a multiple of %d between %d and %d", s.Memory, mempage.Size, memory.MinSize, uint64(memory.MaxSize))
	}
	if _, err := memory.ParseBacking(string(s.Backing)); err != nil {
		errs = append(errs, err)
	}
	if len(s.Cmdline) > loader.MaxCmdline {
		bad("command line of %d bytes: must be at most %d", len(s.Cmdline), loader.MaxCmdline)
	}
	if s.Boot != nil {
		errs = append(errs, s.validateBoot()...)
	} else if len(s.Kernel) == 0 || len(s.Kernel) > MaxKernel {
		bad("kernel of %d bytes: must be between 1 and %d", len(s.Kernel), MaxKernel)
	} else if err := loader.Check(s.Kernel); err != nil {
		errs = append(errs, err)
	}
	if len(s.Initrd) > MaxInitrd {
		bad("initial RAM disk of %d bytes: must be at most %d", len(s.Initrd), MaxInitrd)
	}
	errs = append(errs, validateDevices(s.Devices, s.kinds())...)
	if len(s.CPUID) == 0 || len(s.CPUID) > maxCPUID {
		bad("%d CPUID leaves: must be between 1 and %d", len(s.CPUID), maxCPUID)
	}
	if len(s.Needs) > maxNeeds {
		bad("%d KVM capabilities: must be at most %d", len(s.Needs), maxNeeds)
	}
	return errors.Join(errs...)
}

// ValidName reports why a machine cannot have the name: it would damage a terminal
// or a table.
func ValidName(name string) error {
	if name == "" || len(name) > MaxName || !utf8.ValidString(name) {
		return fmt.Errorf("name of %d bytes: must be 1 to %d bytes of UTF-8", len(name), MaxName)
	}
	for _, r := range name {
		if !unicode.IsGraphic(r) || r == ' ' || r == '/' {
			return fmt.Errorf("name %q: must be letters, digits and signs other than /", name)
		}
	}
	return nil
}

// KernelKind names the kind of file that the kernel is, for people.
func (s *Spec) KernelKind() (name string) {
	name = "bzImage"
	_ = mempage.Guard(func() error { // it may be mapped from a snapshot's file
		switch {
		case s.Boot != nil:
			name = "on the disk"
		case bytes.Equal(s.Kernel, guest.ELF):
			name = "demo guest"
		case bytes.HasPrefix(s.Kernel, []byte("\x7fELF")):
			name = "ELF"
		}
		return nil
	})
	return name
}
