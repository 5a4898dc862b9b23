package kvm

import (
	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// Device attribute of a vCPU's TSC offset (asm/kvm.h).
const (
	vcpuTSCCtrl   = 0 // KVM_VCPU_TSC_CTRL
	vcpuTSCOffset = 0 // KVM_VCPU_TSC_OFFSET
)

// TSCKHz returns the frequency of the guest's TSC in kHz.
func (v *VCPU) TSCKHz() (uint64, error) {
	n, err := again(func() (uintptr, error) {
		khz, err := gokvm.GetTSCKHz(v.h.raw())
		return uintptr(khz), err
	})
	return uint64(n), opError(err, "KVM_GET_TSC_KHZ", "%s", v.what)
}

// SetTSCKHz sets the frequency of the guest's TSC in kHz. Without CapTSCControl
// the kernel accepts the host's frequency within 250 ppm, refuses a lower one with
// unix.EINVAL, and emulates a higher one inaccurately.
func (v *VCPU) SetTSCKHz(khz uint64) error {
	_, err := again(func() (uintptr, error) { return 0, gokvm.SetTSCKHz(v.h.raw(), khz) })
	return opError(err, "KVM_SET_TSC_KHZ", "%s %d kHz", v.what, khz)
}

// TSCOffset returns the difference between the guest's TSC and the host's (scaled)
// TSC.
func (v *VCPU) TSCOffset() (uint64, error) {
	const op = "KVM_GET_DEVICE_ATTR"
	if !v.h.hasAttr(vcpuTSCCtrl, vcpuTSCOffset) {
		return 0, opError(unsupported("this KVM has no KVM_VCPU_TSC_OFFSET"), op, "%s TSC offset", v.what)
	}
	offset, err := v.h.getAttr(vcpuTSCCtrl, vcpuTSCOffset)
	return offset, opError(err, op, "%s TSC offset", v.what)
}

// SetTSCOffset sets the difference between the guest's TSC and the host's (scaled)
// TSC. It reads the offset back: the error is errors.ErrUnsupported if KVM ignores
// the new offset (its guests read the host's TSC), because the guest's clock would
// jump.
func (v *VCPU) SetTSCOffset(offset uint64) error {
	const op = "KVM_SET_DEVICE_ATTR"
	if !v.h.hasAttr(vcpuTSCCtrl, vcpuTSCOffset) {
		return opError(unsupported("this KVM has no KVM_VCPU_TSC_OFFSET"), op, "%s TSC offset %#x", v.what, offset)
	}
	if err := v.h.setAttr(vcpuTSCCtrl, vcpuTSCOffset, offset); err != nil {
		return opError(err, op, "%s TSC offset %#x", v.what, offset)
	}
	if got, err := v.TSCOffset(); err != nil {
		return err
	} else if got != offset {
		return opError(unsupported("this KVM keeps %#x", got), op, "%s TSC offset %#x", v.what, offset)
	}
	return nil
}

// KVMClockCtrl tells the guest, through its kvmclock page, that it was stopped, so
// that its watchdogs ignore that time. The error is unix.EINVAL if the guest has no
// kvmclock on this vCPU.
func (v *VCPU) KVMClockCtrl() error {
	_, err := v.h.ioctl(reqKVMClockCtrl, nil)
	return opError(err, "KVM_KVMCLOCK_CTRL", "%s", v.what)
}
