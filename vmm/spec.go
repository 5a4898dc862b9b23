package vmm

import (
	"errors"
	"fmt"
	"unicode"
	"unicode/utf8"

	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/mempage"
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

// Spec is all that it takes to make a machine, here or on another host: a
// machine is made from it at boot, again at each reset, and it is what a
// migration sends first. The kernel travels too, so that a guest that was
// migrated can reset itself where its kernel's file does not exist.
type Spec struct {
	Version uint32         `cbor:"version"`
	Name    string         `cbor:"name"`
	CPUs    int            `cbor:"cpus"`
	Memory  uint64         `cbor:"memory"` // bytes
	Backing memory.Backing `cbor:"backing"`
	Cmdline string         `cbor:"cmdline"`
	Kernel  []byte         `cbor:"kernel"` // an ELF file with a PVH entry, or a bzImage
	Initrd  []byte         `cbor:"initrd"` // the initial RAM disk; empty: none
	// NoUnpack lets a bzImage unpack itself in the guest.
	NoUnpack bool    `cbor:"no_unpack"`
	Devices  Devices `cbor:"devices"`
	// CPUID is the guest's processor, without what differs between its vCPUs.
	CPUID []kvm.CPUIDEntry `cbor:"cpuid"`
	// TSCKHz is the frequency of the guest's TSC; 0: the host's.
	TSCKHz uint64 `cbor:"tsc_khz"`
	// Needs are the KVM capabilities without which the state of this machine
	// cannot be loaded.
	Needs []uint32 `cbor:"needs"`
	// Tracking is this host's choice and stays here; "": auto.
	Tracking DirtyTracking `cbor:"-"`
}

// Validate reports everything about the spec that no host could make a machine
// from.
func (s *Spec) Validate() error {
	if s.Version != SpecVersion {
		// The rest may mean something else in another version.
		return fmt.Errorf("machine description of version %d: this govmm knows version %d", s.Version, SpecVersion)
	}
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if err := validName(s.Name); err != nil {
		errs = append(errs, err)
	}
	if s.CPUs < 1 || s.CPUs > MaxCPUs {
		bad("%d vCPUs: 1 to %d are possible", s.CPUs, MaxCPUs)
	}
	if s.Memory < memory.MinSize || s.Memory > memory.MaxSize || s.Memory%mempage.Size != 0 {
		bad("memory of %d bytes: a multiple of %d from %d to %d is possible", s.Memory, mempage.Size, memory.MinSize, uint64(memory.MaxSize))
	}
	if _, err := memory.ParseBacking(string(s.Backing)); err != nil {
		errs = append(errs, err)
	}
	if len(s.Cmdline) > loader.MaxCmdline {
		bad("command line of %d bytes: at most %d are possible", len(s.Cmdline), loader.MaxCmdline)
	}
	if len(s.Kernel) == 0 || len(s.Kernel) > MaxKernel {
		bad("kernel of %d bytes: 1 to %d are possible", len(s.Kernel), MaxKernel)
	} else if err := loader.Check(s.Kernel); err != nil {
		errs = append(errs, err)
	}
	if len(s.Initrd) > MaxInitrd {
		bad("initial RAM disk of %d bytes: at most %d are possible", len(s.Initrd), MaxInitrd)
	}
	errs = append(errs, s.Devices.validate()...)
	if len(s.CPUID) == 0 || len(s.CPUID) > maxCPUID {
		bad("%d CPUID leaves: 1 to %d are possible", len(s.CPUID), maxCPUID)
	}
	if len(s.Needs) > maxNeeds {
		bad("%d KVM capabilities: at most %d are possible", len(s.Needs), maxNeeds)
	}
	return errors.Join(errs...)
}

// validName refuses what would make a mess of a terminal or a table.
func validName(name string) error {
	if name == "" || len(name) > MaxName || !utf8.ValidString(name) {
		return fmt.Errorf("name of %d bytes: 1 to %d of UTF-8 are possible", len(name), MaxName)
	}
	for _, r := range name {
		if !unicode.IsGraphic(r) || r == ' ' || r == '/' {
			return fmt.Errorf("name %q: letters, digits and signs but / are possible", name)
		}
	}
	return nil
}

// Encode returns the spec as it goes over the wire.
func (s *Spec) Encode() ([]byte, error) {
	b, err := strictcbor.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode the machine's description: %w", err)
	}
	return b, nil
}

// DecodeSpec decodes and validates what a stranger may have sent.
func DecodeSpec(b []byte) (Spec, error) {
	// The version first: a later one may have fields that are not known here.
	var head struct {
		Version uint32 `cbor:"version"`
	}
	if err := strictcbor.UnmarshalKnown(b, &head); err != nil {
		return Spec{}, fmt.Errorf("decode the machine's description: %w", err)
	}
	if head.Version != SpecVersion {
		return Spec{}, (&Spec{Version: head.Version}).Validate()
	}
	var s Spec
	if err := strictcbor.Unmarshal(b, &s); err != nil {
		return Spec{}, fmt.Errorf("decode the machine's description: %w", err)
	}
	return s, s.Validate()
}
