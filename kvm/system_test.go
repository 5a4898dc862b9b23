package kvm

import (
	"slices"
	"testing"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

func TestSystem(t *testing.T) {
	s := openKVM(t)
	if v := must(s.version())(t); v != 12 {
		t.Errorf("API version %d", v)
	}
	if n := must(s.CheckExtension(gokvm.CapUserMemory))(t); n == 0 {
		t.Error("no KVM_CAP_USER_MEMORY")
	}
	if n := must(s.CheckExtension(Capability(255)))(t); n != 0 {
		t.Errorf("capability 255 is %d", n)
	}
	if n := must(s.vcpuMmapSize())(t); n < 2*mempage.Size || n%mempage.Size != 0 {
		t.Errorf("kvm_run area of %d bytes", n)
	}
	permitted := must(s.RequestXComp())(t)
	if has := must(s.CheckExtension(gokvm.CapSysAttributes))(t); has != 0 && permitted&3 != 3 {
		t.Errorf("XSAVE components %#x, want x87 and SSE at least", permitted)
	}
	t.Logf("XSAVE components permitted to guests: %#x", permitted)
	if again := must(s.RequestXComp())(t); again != permitted {
		t.Errorf("asked again: %#x, first %#x", again, permitted)
	}
}

func TestSupportedCPUID(t *testing.T) {
	entries := must(openKVM(t).SupportedCPUID())(t)
	leaf := func(function uint32) int {
		return slices.IndexFunc(entries, func(e CPUIDEntry) bool { return e.Function == function })
	}
	for _, function := range []uint32{0, 1, 0x80000000, 0x80000001, 0x40000000} {
		if leaf(function) < 0 {
			t.Errorf("%d leaves without %#x", len(entries), function)
		}
	}
	// KVM's signature leaf.
	if i := leaf(0x40000000); i >= 0 && entries[i].Ebx != 0x4b4d564b {
		t.Errorf("leaf 0x40000000 is %+v", entries[i])
	}
}

func TestMSRLists(t *testing.T) {
	s := openKVM(t)
	list := must(s.MSRIndexList())(t)
	for _, index := range []uint32{0x10, 0x174, 0xc0000081, 0xc0000082} {
		if !slices.Contains(list, index) {
			t.Errorf("%#x is not in the list of %d MSRs", index, len(list))
		}
	}
}

// Calls after Close fail, and do not reach other files.
func TestClosed(t *testing.T) {
	s, err := openKVM(t).CreateVM()
	check(t, err)
	v, err := s.CreateVCPU(0)
	check(t, err)
	check(t, v.Close())
	check(t, v.Close())
	check(t, s.Close())
	check(t, s.Close())
	wantErr(t, v.Run(), unix.EBADF, "KVM_RUN vCPU 0: bad file descriptor")
	_, err = v.GetRegs()
	wantErr(t, err, unix.EBADF, "KVM_GET_REGS vCPU 0: bad file descriptor")
	_, err = s.CheckExtension(gokvm.CapUserMemory)
	wantErr(t, err, unix.EBADF, "KVM_CHECK_EXTENSION VM CapUserMemory: bad file descriptor")
	_, err = s.CreateVCPU(0)
	wantErr(t, err, unix.EBADF, "KVM_CHECK_EXTENSION VM CapXSave2: bad file descriptor")
	v.SetImmediateExit(true)
	check(t, v.Kick())
	if r := v.ExitReason(); r != 0 {
		t.Errorf("exit reason %v", r)
	}
	if e := v.IO(); e.Data != nil {
		t.Errorf("port access %+v", e)
	}
	if e := v.MMIO(); e.Data != nil {
		t.Errorf("MMIO %+v", e)
	}
	if e := v.InternalError(); len(e.Data) != 0 {
		t.Errorf("internal error %+v", e)
	}
}
