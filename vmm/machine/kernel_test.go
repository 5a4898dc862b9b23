package machine

import (
	"bytes"
	"compress/gzip"
	"testing"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/vmm/loader/elftest"
)

// TestPeersKernelIsNotUnpacked: the host unpacks a bzImage that its user gave, and
// sends it unpacked. A bzImage from a peer starts at its 64-bit entry, where it
// unpacks itself in the guest.
func TestPeersKernelIsNotUnpacked(t *testing.T) {
	const load, entry64 = 16 << 20, 0x200 // the load address of elftest's bzImage
	elf := elftest.Build(elftest.Kernel{Code: vmtest.JustCount, Load: load})
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	_, err := w.Write(elf)
	check(t, err)
	check(t, w.Close())
	spec := testSpec(t, 1, vmtest.JustCount)
	spec.Memory = 64 << 20
	spec.Kernel = elftest.BzImage([]byte{0xf4}, packed.Bytes())

	rip := func(m *Machine) uint64 {
		check(t, m.Boot())
		regs, err := m.vcpus[0].kvm.GetRegs()
		check(t, err)
		return regs.RIP
	}
	m := fromSpec(t, spec, nil)
	if got := rip(m); got != load {
		t.Errorf("the user's bzImage starts at %#x, want %#x, unpacked", got, load)
	}
	config, err := m.Source().MigrationConfig()
	check(t, err)
	unpacked, err := decodeSpec(config, nil)
	check(t, err)
	if !bytes.Equal(unpacked.Kernel, elf) {
		t.Errorf("a kernel of %d bytes is sent, want the unpacked one of %d", len(unpacked.Kernel), len(elf))
	}

	fromPeer, err := spec.encode(nil)
	check(t, err)
	target, err := (&Builder{Log: vmtest.Log(t)}).BuildTarget(t.Context(), fromPeer)
	check(t, err)
	defer func() { check(t, target.Discard()) }()
	if got := rip(target.Machine); got != load+entry64 {
		t.Errorf("a peer's bzImage starts at %#x, want its 64-bit entry %#x", got, load+entry64)
	}
}
